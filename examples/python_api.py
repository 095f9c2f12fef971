"""The road in Python, one function a stage.

python examples/python_api.py smollm2-135m out/api
python examples/python_api.py ./my-model out/api ratio=0.3 calibration=text.txt max_perplexity_ratio=1.8

`slimexport.run(config, output)` is all of it in one call.
"""

from __future__ import annotations

import sys
from pathlib import Path

import slimexport


def main(model: str, output: Path, **settings: str) -> int:
    # Every setting of the command line is a field; strings are converted as they are in a recipe.
    config = slimexport.RunConfig.model_validate({"model": model, "max_perplexity_ratio": 2.0, **settings})
    progress = slimexport.Progress()

    plan = slimexport.plan(config)  # reads no weights
    dense, shrunk = plan.dense_estimates, plan.estimates
    print(f"{dense.parameters:,} -> {shrunk.parameters:,} parameters, ratio {plan.ratio:.4f}")

    checkpoint = slimexport.prune(config, output, force=True, progress=progress)
    print(f"{checkpoint.path}: {checkpoint.bytes / 1e6:,.1f} MB")

    for name, artifact in slimexport.export(output, {}, progress=progress).items():
        print(f"{name}: {artifact.path} ({artifact.builder}, {artifact.precision})")

    verification = slimexport.verify(output, {}, progress=progress)
    perplexity = verification.figure("accuracy.perplexity")
    if perplexity is not None:
        print(f"token perplexity {perplexity.baseline} -> {perplexity.shrunk}")

    report = slimexport.report(output, {}, progress=progress)
    print(report.verdict)

    # The shrunk checkpoint is a transformers model like any other.
    small, tokenizer = slimexport.load(output / "checkpoint")
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    tokens = small.generate(**tokens, max_new_tokens=8, do_sample=False)
    print(tokenizer.decode(tokens[0]))
    return 0 if report.passed else 3


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    settings = dict(word.split("=", 1) for word in sys.argv[3:])
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), **settings))
