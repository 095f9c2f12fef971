"""RunConfig from recipes and flags: precedence, defaults, and errors that say what to mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from slimexport.config import RunConfig, make_config
from slimexport.errors import BadInputError, UsageError
from slimexport.gates.declared import Gate
from slimexport.options import STAGES
from slimexport.recipe import builtin, load_recipe, text_of
from slimexport.run_directory import RunDirectory
from slimexport.stages.inputs import Overrides, config_of


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_field_belongs_to_one_stage() -> None:
    # A field that is in no stage would have no flag.
    in_stages = [name for names in STAGES.values() for name in names]
    assert sorted([*in_stages, "model"]) == sorted(RunConfig.model_fields)


def test_every_field_has_a_help_text() -> None:
    assert all(field.description for field in RunConfig.model_fields.values())


def test_frozen() -> None:
    config = make_config({"model": "m"})
    with pytest.raises(ValidationError):
        config.ratio = 0.5  # type: ignore[misc]


def test_json_round_trip() -> None:
    config = make_config(
        {
            "model": "m",
            "target": ["onnx", "genai"],
            "baseline_cache": "/c",
            "gates": ["ratio(accuracy.nll)<=1"],
            "max_kl": 0.2,
        }
    )
    assert make_config(config.model_dump(mode="json")) == config


def test_recipe_with_every_kind_of_value(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: m\nratio: 0.3\ntarget: onnx\nprompt_lengths: [16, 32]\nbaseline: no\ndamping: 1e-3\n"
        "gates:\n- accuracy.kl<=0.2\n- {figure: decode.tpot_ms, of: speedup, op: '>=', bound: 1.2}\n",
    )
    config = make_config(load_recipe(path))
    assert config.target == ("onnx",)
    assert config.prompt_lengths == (16, 32)
    assert config.baseline is False
    assert config.damping == 1e-3  # PyYAML reads 1e-3 as a string
    assert config.gates == (
        Gate(figure="accuracy.kl", bound=0.2),
        Gate(figure="decode.tpot_ms", of="speedup", op=">=", bound=1.2),
    )


def test_one_gate_on_one_line() -> None:
    assert make_config({"model": "m", "gates": "accuracy.kl<=0.2"}).gates == (Gate(figure="accuracy.kl", bound=0.2),)


def test_sugar_becomes_gates() -> None:
    values = {"max_perplexity_ratio": 1.5, "max_kl": 0.2, "min_speedup": 1.2, "max_latency_ms": 20, "max_size_mb": 400}
    gates = make_config({"model": "m", **values, "gates": ["load.seconds<=1"]}).all_gates()
    assert [str(gate) for gate in gates] == [
        "ratio(accuracy.perplexity)<=1.5", "accuracy.kl<=0.2", "speedup(decode.tpot_ms)>=1.2", "decode.tpot_ms<=20",
        "size.export_mb<=400", "load.seconds<=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rato": 0.3}, "unknown key 'rato'. Did you mean 'ratio'?"),
        ({"calibration-tokens": 5}, "Did you mean 'calibration_tokens'?"),
        ({"ratio": 1.0}, "ratio: Input should be less than 1"),
        ({"ratio": -0.1}, "ratio: Input should be greater than or equal to 0"),
        ({"ratio": float("nan")}, "ratio: "),
        ({"ratio": "a lot"}, "ratio: Input should be a valid number"),
        ({"ratio": [0.3]}, "ratio: Input should be a valid number"),
        ({"ratio": True}, "ratio: Input should not be a boolean"),
        ({"seed": True}, "seed: Input should not be a boolean"),
        ({"calibration_tokens": 12.5}, "calibration_tokens: Input should be a valid integer"),
        ({"layout": "per-layer"}, "layout: Input should be 'auto', 'per_layer' or 'uniform' (got 'per-layer')"),
        ({"target": 5}, "target.0: Input should be a valid string"),
        ({"prompt_lengths": ["x"]}, "prompt_lengths.0: Input should be a valid integer"),
        ({"max_kl": float("inf")}, "max_kl: Input should be a finite number"),
        ({"gates": ["a<1"]}, "gates: 'a<1' is not a gate"),
        ({"gates": [{"figure": "a"}]}, "gates.0.bound: Field required"),
        ({"gates": [{"figure": "a", "bound": 1, "off": "ratio"}]}, "gates.0.off: Extra inputs are not permitted"),
        ({"gates": 7}, "gates"),
        ({"gates": ["accuracy.kll<=1"]}, "gates: no figure 'accuracy.kll'. Did you mean 'accuracy.kl'?"),
        ({"gates": {"accuracy.kl": {"maximum": 1}}}, "unknown condition 'maximum'. Did you mean 'max'?"),
        ({"gates": {"accuracy.kl": 1}}, "write conditions"),
        ({"gates": {"accuracy.kl": {"max": "a"}}}, "max must be a number"),
        ({"gates": {"accuracy.kl": {"unit": "nats/token"}}}, "no condition is given"),
        ({"gates": {"decode.tpot_ms": {"max": 1, "unit": "s"}}}, "decode.tpot_ms is in ms, not in s"),
        ({"group_size_start": 1, "group_size_end": 4}, "group_size_end must not be larger than group_size_start"),
        ({"layout": "uniform", "allocation": "incremental"}, "layout uniform has the same sizes in every block"),
        ({"first_ratio": 1.0}, "first_ratio: Input should be less than 1"),
        ({"target": []}, "target: Tuple should have at least 1 item"),
        ({"precision": []}, "precision: Tuple should have at least 1 item"),
        ({"fast": "on", "layout": True}, "layout: Input should not be a boolean"),
    ],
)
def test_bad_values_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        make_config({"model": "m", **values}, "recipe.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("recipe.yaml: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_on_and_off_are_words_of_yaml(tmp_path: Path) -> None:
    for word in ("on", "off"):
        (tmp_path / "recipe.yaml").write_text(f"model: m\nbias_compensation: {word}\n")
        assert make_config(load_recipe(tmp_path / "recipe.yaml")).bias_compensation == word


def test_a_directory_of_a_recipes_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fast").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(Path("fast"))


def test_error_in_a_flag_names_the_flag() -> None:
    with pytest.raises(UsageError, match=r"^--eval-window: Input should be"):
        make_config({"model": "m", "eval_window": 1}, "recipe.yaml", flags={"eval_window"})


def test_missing_model() -> None:
    with pytest.raises(BadInputError, match="model: Field required"):
        make_config({})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: [0.3\n", "not valid YAML"),
        ("ratio: 0.3\n\tseed: 1\n", "line 2 is not valid YAML"),
        ("- ratio\n", "must be a mapping of keys to values, not a list"),
        ("ratio 0.3", "not a str"),
        ("ratio: 0.3\nratio: 0.4\n", "line 1 is not valid YAML: 'ratio' is given twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("raito: 1", "unknown key 'raito'. Did you mean 'ratio'?"),
        ("5: 1", "unknown key 5"),
    ],
)
def test_bad_recipe_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(BadInputError, match=r"is no file, and none of ours .* Did you mean 'quality'\?"):
        load_recipe(Path("qualitty"))
    with pytest.raises(BadInputError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="it is not UTF-8 text"):
        load_recipe(tmp_path / "binary.yaml")


def test_empty_recipe_is_no_setting(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize("name", builtin())
def test_builtin_recipes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a config, says what it is for, and can be replaced by a file of one's own."""
    assert make_config({"model": "m", **load_recipe(Path(name))})
    assert len(builtin()[name]) > 60
    assert "ratio:" in text_of(name)
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("ratio: 0.01\n")
    assert load_recipe(Path(name)) == {"ratio": 0.01}


def test_gates_are_added_to_those_of_a_recipe_or_a_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.state["config"] = {"model": "m", "gates": [{"figure": "accuracy.kl", "bound": 0.2}]}
    recipe = {"gates": {"accuracy.perplexity": {"max_ratio_to_baseline": 1.5}}}

    def gates(flags: dict[str, Any]) -> list[str]:
        return [str(gate) for gate in config_of(directory, Overrides(recipe, flags, "r.yaml")).gates]

    assert gates({}) == ["accuracy.kl<=0.2", "ratio(accuracy.perplexity)<=1.5"]
    assert gates({"gates": (Gate.parse("load.seconds<=1"),)}) == [*gates({}), "load.seconds<=1"]
    # the same figure, but of the shrunk model alone
    assert gates({"gates": "accuracy.perplexity<=20"}) == [*gates({}), "accuracy.perplexity<=20"]
    replaced = {"gates": ["accuracy.kl<=0.3", "accuracy.kl>=0.1", "ratio(accuracy.perplexity)<=2"]}
    assert gates(replaced) == replaced["gates"]
    assert gates({"max_kl": 0.4}) == ["ratio(accuracy.perplexity)<=1.5"]
    short = config_of(directory, Overrides({"max_kl": 0.5, "max_size_mb": 9}, {"gates": "accuracy.kl<=0.3"}, "r.yaml"))
    assert [str(gate) for gate in short.all_gates()] == ["size.export_mb<=9", "accuracy.kl<=0.3"]


def test_an_error_is_the_recipes_or_the_flags(tmp_path: Path) -> None:
    """Of a command that goes on in a run directory: exit code 4 or 2."""
    directory = RunDirectory(tmp_path)
    directory.state["config"] = {"model": "m"}
    wrong = {"gates": ["accuracy.kk<=1"]}
    with pytest.raises(BadInputError, match=r"r\.yaml: gates: .*accuracy\.kl"):
        config_of(directory, Overrides(wrong, {"max_kl": 0.1}, "r.yaml"))
    with pytest.raises(UsageError, match=r"--gate: .*accuracy\.kl"):
        config_of(directory, Overrides({"max_kl": 0.1}, wrong, "r.yaml"))
    with pytest.raises(UsageError, match="--gate"):
        config_of(directory, wrong)
    with pytest.raises(BadInputError, match=r"r\.yaml: gates: .*accuracy\.kl"):
        config_of(directory, Overrides(wrong, {"gates": ["accuracy.kl<=1"]}, "r.yaml"))
    with pytest.raises(UsageError, match="'a<1' is not a gate"):
        config_of(directory, Overrides({"gates": ["accuracy.kl<=1"]}, {"gates": ["a<1"]}, "r.yaml"))
    assert config_of(directory, Overrides({"seed": 1}, {"max_kl": 0.1}, "r.yaml")).seed == 1
