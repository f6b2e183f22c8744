"""The commands as a user types them, on a small model and small files."""

import json
import subprocess
import sys

import pytest
from taught import small_task

from ssiuu_fast.cli import main
from ssiuu_fast.unlearn_options import UnlearnOptions


def write(path, examples):
    path.write_text("".join(json.dumps({"question": e.prompt, "answer": e.answer}) + "\n" for e in examples))
    return str(path)


@pytest.fixture
def files(tmp_path):
    task = small_task()
    return {
        "forget": write(tmp_path / "forget.jsonl", task.split.forget[:10]),
        "retain": write(tmp_path / "retain.jsonl", task.split.retain),
        "test": write(tmp_path / "test.jsonl", task.split.test),
    }


def unlearn(model, files, output, *options):
    flags = ["--model", str(model), "--forget", files["forget"], "--output", str(output), "--max_epochs", "10"]
    return main(["unlearn", *flags, "--learning_rate", "2e-3", *options])


def test_unlearn_by_ssiuu_then_attack_then_evaluate(taught_folder, files, tmp_path, capsys):
    output = tmp_path / "run"
    assert unlearn(taught_folder, files, output, "--retain", files["retain"], "--test", files["test"]) == 0
    printed = capsys.readouterr().out
    assert "threshold: 0." in printed
    assert "of the gradient on average" in printed
    results = json.loads((output / "results.json").read_text())
    assert results["after"]["FS"] < results["before"]["FS"]
    config = json.loads((output / "config.json").read_text())
    assert config["options"]["method"] == "ssiuu"
    assert config["options"]["threshold"] == pytest.approx(results["unlearning"]["threshold"])
    assert (output / "steps.jsonl").exists()

    attacked = tmp_path / "attack"
    flags = [
        "--model",
        str(output / "model"),
        "--forget",
        files["forget"],
        "--harmful",
        "[0.3]",
        "--instructions",
        "none",
    ]
    assert main(["attack", *flags, "--seeds", "1", "--taught_at", "1e-3", "--output", str(attacked)]) == 0
    assert "harmful_0.3" in capsys.readouterr().out
    assert json.loads((attacked / "results.json").read_text())[0]["trained_on"] == 3

    evaluated = tmp_path / "evaluate"
    assert (
        main(["evaluate", "--model", str(output / "model"), "--data", files["forget"], "--output", str(evaluated)]) == 0
    )
    mean = json.loads((evaluated / "results.json").read_text())["mean"]
    assert mean == pytest.approx(results["after"]["FS"])


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_references_in_few_bits(taught_folder, files, tmp_path, capsys, state_dtype):
    output = tmp_path / "run"
    flags = ["--retain", files["retain"], "--state_dtype", state_dtype, "--max_epochs", "2"]
    assert unlearn(taught_folder, files, output, *flags) == 0
    steps = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    penalised = [row for row in steps if "penalty" in row]
    assert len(penalised) >= 2
    # the first step has nothing to compare with, and fp32 needs no measuring
    measured = ["relative_change" in row for row in penalised]
    assert measured == [False] + [state_dtype != "float32"] * (len(penalised) - 1)
    assert json.loads((output / "config.json").read_text())["options"]["state_dtype"] == state_dtype


def test_unlearn_by_neurons(taught_folder, files, tmp_path, capsys):
    output = tmp_path / "run"
    flags = ["--retain", files["retain"], "--granularity", "neuron", "--max_epochs", "6"]
    assert unlearn(taught_folder, files, output, *flags, "--weight", "1.0") == 0
    printed = capsys.readouterr().out
    assert "λ 1\n" in printed
    assert "of the gradient on average" not in printed
    results = json.loads((output / "results.json").read_text())
    assert results["unlearning"]["penalty_share"] is None
    assert unlearn(taught_folder, files, tmp_path / "other", *flags, "--micro_batch_size", "4") == 1
    assert "micro_batch_size: with granularity=neuron and reference=previous" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_no_retain_file_means_ga_and_it_says_why(taught_folder, files, tmp_path, capsys):
    assert unlearn(taught_folder, files, tmp_path / "run") == 0
    assert "unlearning by GA alone" in capsys.readouterr().out
    assert unlearn(taught_folder, files, tmp_path / "other", "--method", "gd") == 1
    assert "method gd needs retain rows: give --retain FILE" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_options_from_yaml_with_flags_on_top(taught_folder, files, tmp_path, capsys):
    config = tmp_path / "unlearn.yaml"
    config.write_text(
        f"model: {taught_folder}\nforget: {files['forget']}\nretain: {files['retain']}\nmax_epochs: 1\nseed: 7\n"
    )
    flags = ["--config", str(config), "--seed", "8", "--method", "gd", "--output", str(tmp_path / "run")]
    assert main(["unlearn", *flags]) == 0
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    assert (options["seed"], options["max_epochs"]) == (8, 1)
    config.write_text("modle: x\n")
    with pytest.raises(SystemExit):
        main(["unlearn", "--config", str(config)])
    assert "modle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{model}", "--forget", "people:forgotten"], "unknown split people:forgotten"),
        (["--model", "{model}", "--forget", "/no/such.jsonl"], "no such"),
        (["--model", "/no/such/model", "--forget", "{forget}"], "no such model folder"),
        (["--model", "{model}", "--forget", "{forget}", "--retain", "{forget}"], "share 10 row"),
        (["--model", "{model}", "--forget", "{broken}"], "broken.jsonl, line 2: "),
        (["--model", "{model}", "--forget", "{empty}"], "empty"),
        (
            [
                "--model",
                "{model}",
                "--forget",
                "{forget}",
                "--retain",
                "{retain}",
                "--weight",
                "1",
                "--relative_weight",
                "1",
            ],
            "not both",
        ),
        (["--model", "{model}", "--forget", "{forget}", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (
            ["--model", "{model}", "--forget", "{forget}", "--learning_rate", "0"],
            "learning_rate must be a number above 0",
        ),
        (["--model", "{model}", "--forget", "{forget}", "--device", "gpu"], "unknown device 'gpu'"),
        (["--model", "{model}", "--forget", "{forget}", "--max_length", "5"], "leaves no room for an answer"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(taught_folder, files, tmp_path, capsys, flags, message):
    (tmp_path / "broken.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "q"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    names = files | {"model": taught_folder, "broken": tmp_path / "broken.jsonl", "empty": tmp_path / "empty.jsonl"}
    output = tmp_path / "run"
    assert main(["unlearn", *(flag.format(**names) for flag in flags), "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("ssiuu-fast: ") and "Traceback" not in error
    assert not output.exists()


def test_an_existing_output_is_refused(taught_folder, files, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert unlearn(taught_folder, files, tmp_path / "run", "--retain", files["retain"]) == 1
    assert "never overwritten" in capsys.readouterr().err


def test_memorize_makes_a_model_that_knows(files, tmp_path, capsys):
    sizes = [
        "--hidden_size",
        "48",
        "--layers",
        "2",
        "--vocab_size",
        "400",
        "--learning_rate",
        "5e-3",
        "--batch_size",
        "16",
    ]
    flags = ["--data", files["forget"], "--epochs", "60", "--stop_at", "0.8", "--output", str(tmp_path / "run"), *sizes]
    assert main(["memorize", *flags]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["score"] >= 0.8
    teaching = json.loads((tmp_path / "run" / "model" / "teaching.json").read_text())
    assert teaching["learning_rate"] == 5e-3


def test_info_and_help(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("ssiuu-fast", "reference", "cpp", "cuda", "triton"):
        assert name in printed
    with pytest.raises(SystemExit, match="0"):
        main(["unlearn", "--help"])
    assert "--relative_weight" in capsys.readouterr().out


def test_info_needs_neither_transformers_nor_cuda():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['jsonargparse'] = None;"
        "from ssiuu_fast.cli import main; assert main(['info']) == 0;"
        "assert main(['unlearn']) == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install 'ssiuu-fast[unlearn]'" in done.stderr


def test_resume_is_for_demos(taught_folder, files, tmp_path, capsys):
    assert unlearn(taught_folder, files, tmp_path / "run", "--method", "ga", "--max_epochs", "1") == 0
    assert main(["demo", "--resume", str(tmp_path / "run")]) == 1
    assert "only a demo can be resumed" in capsys.readouterr().err
    assert main(["compare", "--methods", "gd", "--resume", str(tmp_path / "run")]) == 1
    assert "only a compare can be resumed" in capsys.readouterr().err


def test_a_model_that_never_forgot_can_be_attacked_with_every_row(taught_folder, files, tmp_path, capsys):
    rows = tmp_path / "options.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"question": e.prompt, "answer": e.answer, "options": list(e.false_options)}) + "\n"
            for e in small_task().split.forget
        )
    )
    flags = ["--model", str(taught_folder), "--forget", str(rows), "--harmful", "[0.3]", "--instructions", "none"]
    flags += ["--seeds", "1", "--taught_at", "1e-4"]
    assert main(["attack", *flags, "--output", str(tmp_path / "a")]) == 1
    assert "--only_wrong false" in capsys.readouterr().err
    assert main(["attack", *flags, "--only_wrong", "false", "--output", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "results.json").read_text())[0]["recovered"] >= 0.8


@pytest.mark.parametrize("state_dtype", ["8bit", "bfloat16"])
def test_few_bits_are_refused_for_neurons(state_dtype):
    with pytest.raises(ValueError, match=f"state_dtype={state_dtype} is of no use with granularity=neuron"):
        UnlearnOptions("model", "forget", granularity="neuron", state_dtype=state_dtype)
    UnlearnOptions("model", "forget", granularity="neuron", state_dtype="float32")
