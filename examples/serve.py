"""Generates with onnxruntime-genai from what `slimexport run MODEL --target genai -o out/` wrote.

python examples/serve.py out/genai "What is a prune?"
"""

import json
import sys

import onnxruntime_genai as genai


def answer(directory: str, question: str, most: int = 128) -> str:
    model = genai.Model(directory)
    tokenizer = genai.Tokenizer(model)
    messages = json.dumps([{"role": "user", "content": question}])
    try:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except Exception:  # a model without a chat template: it goes on with the text
        prompt = question
    tokens = tokenizer.encode(prompt)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=len(tokens) + most, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    return tokenizer.decode(generator.get_sequence(0)[len(tokens) :])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(answer(*sys.argv[1:]))
