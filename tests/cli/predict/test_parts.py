"""Parts of a prediction: whatever stopped it or shared it out, it goes on; what was made otherwise is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import predict
from tests.cli.conftest import ROOT, TORCHRUN
from tests.cli.predict.conftest import DOCUMENTS, files, part_names, rows_of
from tests.conftest import write_corpus


@pytest.mark.parametrize("output", ["out.csv", "out.jsonl"])
def test_shards_in_any_order_give_what_one_process_gives(run, made, output):
    assert run(output=f"one{output}")[0] == 0
    assert made == [0, 1, 2, 3, 4]
    for shard, numbers in (("3/3", [2]), ("1/3", [0, 3]), ("2/3", [1, 4])):
        assert not Path(output).exists()
        made.clear()
        code, console = run(f"--shard {shard}", output)
        assert code == 0, console
        assert made == numbers
    assert Path(output).read_bytes() == Path(f"one{output}").read_bytes()
    assert files() == {"corpus.jsonl", output, f"{output}.json", f"one{output}", f"one{output}.json"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_keeps_the_parts_that_are_done(run, made, monkeypatch, number, code):
    assert run(output="whole.csv")[0] == 0
    with monkeypatch.context() as patch:
        predict_part = predict.predict_part

        def stop(reader, part):
            if part.ids[0] == "corpus-10":
                os.kill(os.getpid(), number)
            return predict_part(reader, part)

        patch.setattr(predict, "predict_part", stop)
        got, console = run()
        assert got == code
        assert "Traceback" not in console
    assert part_names() == ["part-0000000", "part-0000001"]
    assert set(os.listdir("out.csv.parts")) - {"lock"} == {"fingerprint.json", *part_names()}
    made.clear()
    assert run()[0] == 0
    assert made == [2, 3, 4]
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_killed_and_started_again(folder, models, start, run, made, monkeypatch):
    monkeypatch.setattr(predict, "PART_DOCUMENTS", 1000)
    write_corpus(folder / "corpus.jsonl", 2300, words=(2, 15))
    paths = f"--model_path {models}/model --input_path corpus.jsonl --output_path out.csv"
    process = start(folder, f"--mode predict {paths} --device cpu")
    deadline = time.monotonic() + 120
    while not part_names() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    there = [int(name.removeprefix("part-")) for name in part_names()]
    assert there[0] == 0
    assert len(there) < 3
    assert run()[0] == 0
    assert made == [number for number in range(3) if number not in there]
    assert run(output="whole.csv")[0] == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert len(rows_of("out.csv")) == 2300


def test_a_part_is_checked_once_and_put_together_once(run, monkeypatch):
    reads: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))
    parts = [f"part-{number:07d}" for number in range(5)]
    assert run("--shard 1/2")[0] == 0
    assert [name for name in reads if name in parts] == []
    assert run()[0] == 0
    assert [name for name in reads if name in parts] == [*parts[::2], *parts]


def test_a_missing_and_a_damaged_part_are_made_again(run, made):
    assert run(output="whole.csv")[0] == 0
    assert run("--shard 1/2")[0] == run("--shard 1/2")[0] == 0
    assert part_names() == ["part-0000000", "part-0000002", "part-0000004"]
    parts = [Path("out.csv.parts") / name for name in part_names()]
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    parts[1].unlink()
    parts[2].write_bytes(b"")
    made.clear()
    code, console = run()
    assert code == 0
    assert made == [0, 1, 2, 3, 4]
    assert console.count("is damaged; it is made again") == 2
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()


@pytest.mark.parametrize(
    ("flags", "model", "named"),
    [
        ("", "other", "the model was "),
        ("--max_windows 2", "model", "--max_windows was 4, is 2"),
        ("--mixed_precision", "model", "precision was fp32, is bf16"),
        ("", "model", "the input was 1 files, "),
    ],
)
@pytest.mark.parametrize("state", ["parts", "finished"])
def test_what_was_made_otherwise_is_refused(run, made, flags, model, named, state):
    assert run("--shard 1/2" if state == "parts" else "")[0] == 0
    if named.startswith("the input"):
        with Path("corpus.jsonl").open("a") as file:
            file.write('{"text": "w7"}\n')
    before = {path: path.read_bytes() for path in Path().glob("out.csv*/part*" if state == "parts" else "out.csv*")}
    made.clear()
    code, console = run(flags, model=model)
    assert code == 2
    assert named in console
    assert console.count(" was ") - console.count("was made") == 1
    assert made == []
    assert before
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_output_stays_and_any_other_file_is_refused(run, made):
    Path("out.csv").write_text("mine")
    code, console = run()
    assert code == 2
    assert "--output_path out.csv: exists already" in console
    assert Path("out.csv").read_text() == "mine"
    Path("out.csv").unlink()
    assert run()[0] == 0
    before = Path("out.csv").stat().st_ino, Path("out.csv").stat().st_mtime_ns
    made.clear()
    code, console = run("--batch_size 3 --shard 2/2")
    assert code == 0
    assert "out.csv is finished" in console
    assert made == []
    assert (Path("out.csv").stat().st_ino, Path("out.csv").stat().st_mtime_ns) == before
    with Path("out.csv").open("a") as file:
        file.write("more")
    code, console = run()
    assert code == 2
    assert "was changed" in console
    assert files() == {"corpus.jsonl", "out.csv", "out.csv.json"}


def test_a_folder_that_is_not_ours_is_left_alone(run):
    Path("out.csv.parts").mkdir()
    Path("out.csv.parts/photo.jpg").write_bytes(b"1")
    code, console = run()
    assert code == 2
    assert "holds photo.jpg" in console
    assert Path("out.csv.parts/photo.jpg").read_bytes() == b"1"


def test_what_never_made_a_part_may_be_made_otherwise(run, made):
    code, console = run("--text_column content")
    assert code == 3
    assert "no 'content'" in console
    assert run()[0] == 0
    assert made == [0, 1, 2, 3, 4]


def test_a_rival_of_another_making_that_began_meanwhile(run, made, monkeypatch):
    predict_part = predict.predict_part

    def begin_otherwise(reader, part):
        if part.ids[0] == "corpus-0":
            Path("out.csv.parts/fingerprint.json").write_text('{"the model": "another"}')
        return predict_part(reader, part)

    monkeypatch.setattr(predict, "predict_part", begin_otherwise)
    code, console = run()
    assert code == 2
    assert "the model was another" in console
    assert part_names() == []


def test_the_parts_before_a_bad_line_are_kept_for_skip(run, made):
    with Path("corpus.jsonl").open("a") as file:
        file.write("{broken\n")
    assert run()[0] == 3
    assert made == [0, 1, 2, 3]
    assert run("--on_bad_lines skip")[0] == 0
    assert made == [0, 1, 2, 3, 4]
    assert len(rows_of("out.csv")) == DOCUMENTS


def test_long_documents_make_smaller_parts(run, made, monkeypatch):
    assert run(output="whole.csv")[0] == 0
    made.clear()
    monkeypatch.setattr(predict, "PART_CHARACTERS", 150)
    assert run()[0] == 0
    assert len(made) > 10
    for row, whole in zip(rows_of("out.csv"), rows_of("whole.csv"), strict=True):
        assert row["id"] == whole["id"]
        assert abs(float(row["prob_late"]) - float(whole["prob_late"])) < 1e-5


def test_an_input_that_vanishes_meanwhile(run, monkeypatch):
    predict_part = predict.predict_part

    def remove(reader, part):
        Path("corpus.jsonl").unlink()
        return predict_part(reader, part)

    monkeypatch.setattr(predict, "predict_part", remove)
    code, console = run()
    assert code == 3
    assert "corpus.jsonl: No such file or directory; the input must stay until all of it is read" in console
    assert part_names() == []


def test_texts_are_looked_at_twice_however_many_there_are(run, monkeypatch):
    """All of them once, then those of each part; or a million of them would be looked at a thousand times."""
    Path("texts").mkdir()
    for number in range(DOCUMENTS):
        Path(f"texts/{number:02}.txt").write_text("w7 w8", encoding="utf-8")
    looked_at, stamps = [], predict.stamps

    def count(files):
        looked_at.extend(listed := list(files))
        return stamps(listed)

    monkeypatch.setattr(predict, "stamps", count)
    assert run(inputs="texts")[0] == 0
    assert len(looked_at) == 2 * DOCUMENTS
    assert len(rows_of("out.csv")) == DOCUMENTS


def test_an_input_that_changes_meanwhile(run, monkeypatch):
    predict_part = predict.predict_part

    def change(reader, part):
        if part.ids[0] == "corpus-5":
            os.utime("corpus.jsonl", ns=(1, 1))
        return predict_part(reader, part)

    monkeypatch.setattr(predict, "predict_part", change)
    code, console = run()
    assert code == 3
    assert "changed while it was read" in console
    assert part_names() == ["part-0000000"]


def test_another_process_finishes_first(run, monkeypatch):
    finish = predict.finish
    before = []

    def after_another(*arguments):
        monkeypatch.setattr(predict, "finish", finish)
        assert run()[0] == 0
        before.append(Path("out.csv").stat())
        assert not Path("out.csv.parts").exists()
        return finish(*arguments)

    monkeypatch.setattr(predict, "finish", after_another)
    code, console = run()
    assert code == 0, console
    assert [Path("out.csv").stat()] == before
    assert files() == {"corpus.jsonl", "out.csv", "out.csv.json"}


def test_a_shard_that_lags_behind_an_output_makes_no_part(run, made, monkeypatch):
    """Another shard has found all parts there and put them together while this one still read the input."""
    predict_parts = predict.predict_parts

    def after_another(*arguments):
        monkeypatch.setattr(predict, "predict_parts", predict_parts)
        assert run()[0] == 0
        made.clear()
        return predict_parts(*arguments)

    monkeypatch.setattr(predict, "predict_parts", after_another)
    code, console = run("--shard 1/2")
    assert code == 0, console
    assert made == []
    assert files() == {"corpus.jsonl", "out.csv", "out.csv.json"}


def test_shard_and_torchrun_are_two_ways_to_share(run, monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    code, console = run("--shard 1/2")
    assert code == 2
    assert "--shard does not go with torchrun" in console


def test_under_torchrun(folder, models, run, monkeypatch):
    monkeypatch.setattr(predict, "PART_DOCUMENTS", 1000)
    write_corpus(folder / "corpus.jsonl", 2300, words=(2, 15))
    torchrun = [*TORCHRUN, "--nproc-per-node", "2", str(ROOT / "main.py")]
    paths = f"--model_path {models}/model --input_path corpus.jsonl --output_path out.csv"
    done = subprocess.run(
        [*torchrun, *f"--mode predict {paths} --device cpu".split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [done.stderr.count(f"part {number}: 1000") for number in (1, 2)] == [1, 1]
    assert done.stderr.count("process 1: part 2: 1000 documents") == 1
    assert not Path("out.csv.parts").exists()
    assert run(output="whole.csv")[0] == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert len(rows_of("out.csv")) == 2300
