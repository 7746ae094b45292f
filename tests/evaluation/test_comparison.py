"""Evaluations beside one another: what is compared, what is not, and what cannot be read."""

import json
import re

import pytest

from llave_jax.evaluation import comparison
from tools import compare_evaluations


def summary(benchmark="mmeb", model="a/model", averages=None, **scores):
    tasks = {
        name: {
            "meta_task": "vqa",
            "metric": "precision@1",
            "score": score,
            "chance": 0.1,
            "queries": 100,
            "metrics": {"precision@1": score},
        }
        for name, score in scores.items()
    }
    return {
        "model": {"model": model},
        "benchmark": benchmark,
        "tasks": tasks,
        "averages": {},
        "averages_of": {"overall": list(scores)} if averages is None else averages,
    }


def write(path, content):
    path.mkdir(parents=True, exist_ok=True)
    (path / "summary.json").write_text(json.dumps(content))
    return str(path)


def test_differences_are_of_the_same_tasks_and_metrics(tmp_path):
    own = comparison.from_summary(summary(A=0.5, B=0.25, C=0.1))
    other = summary(A=0.3, B=0.7, D=0.9, averages={"overall": ["A", "B", "D"]})
    # Another main metric there; what this run counts was measured too.
    other["tasks"]["A"] |= {"metric": "hit@1", "metrics": {"hit@1": 0.9, "precision@1": 0.3}}
    other["tasks"]["B"] |= {"queries": 90, "settings": {"frames": 64}}
    base = comparison.from_summary(other)
    assert comparison.task_rows(own, {"base": base}) == [
        ["dataset", "metric", "this run", "base", "difference"],
        ["A", "precision@1", "50.0", "30.0", "+20.0"],
        ["B", "precision@1", "25.0", "70.0", "-45.0"],
        ["C", "precision@1", "10.0", "-", "-"],
        ["D", "precision@1", "-", "90.0", "-"],
    ]
    # Not the baseline's own average, which is over other tasks.
    assert comparison.average_rows(own, {"base": base})[1:] == [["overall", "28.3", "-", "-"]]
    two = comparison.from_summary(summary(A=0.4, B=0.2, averages={"overall": ["A", "B"]}))
    rows = comparison.average_rows(two, {"base": base, "self": two})
    assert rows[1:] == [["overall", "30.0", "50.0", "-20.0", "30.0", "0.0"]]
    assert comparison.unlike(own, {"base": base}) == [
        "B of base: queries 100 here, 90 there; frames - here, 64 there."
    ]


def test_all_metrics_of_a_benchmark_without_averages():
    content = summary("msvd", v2t=0.5, averages={})
    content["tasks"]["v2t"]["metrics"]["median rank"] = 3.0
    own = comparison.from_summary(content)
    content["tasks"]["v2t"]["metrics"]["median rank"] = 4.5
    base = comparison.from_summary(content)
    assert comparison.task_rows(own, {"base": base})[1:] == [
        ["v2t", "precision@1", "50.0", "50.0", "0.0"],
        ["v2t", "median rank", "3.0", "4.5", "-1.5"],
    ]
    assert comparison.average_rows(own, {"base": base}) == []


def test_a_folder_for_each_benchmark(tmp_path):
    write(tmp_path / "run/mmeb", summary(A=0.5))
    write(tmp_path / "run/digits", summary("digits", B=0.5))
    one, other = comparison.read_evaluations(
        [str(tmp_path / "run"), "a=b=" + write(tmp_path / "x", summary(A=0.5))]
    )
    assert (one.label, list(one.benchmarks)) == ("run", ["digits", "mmeb"])
    assert other.label == "a=b"
    assert comparison.of_benchmark([one, other], "digits") == {"run": one.benchmarks["digits"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no summary.json"),
        ([], "not written by this version"),
        ({**summary(A=0.5), "tasks": {"A": {}}}, "KeyError 'meta_task'"),
        (summary(A=float("nan")), "expected a number, found nan"),
        (summary(A="0.5"), "expected a number, found '0.5'"),
        (summary(A=None), "expected a number, found None"),
        (summary("other", A=0.5), "has other; expected scores of mmeb"),
    ],
)
def test_what_cannot_be_compared_is_named(content, message, tmp_path):
    if content is not None:
        write(tmp_path / "base", content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        comparison.check_shared(comparison.read_evaluations([str(tmp_path / "base")]), ["mmeb"])
    assert "base" in str(caught.value)


def test_labels_differ(tmp_path):
    first, second = (write(tmp_path / name / "out", summary(A=0.5)) for name in "ab")
    with pytest.raises(ValueError, match="'out' is the label of another run; give LABEL=DIR"):
        comparison.read_evaluations([first, second])
    labels = [e.label for e in comparison.read_evaluations([first, f"b={second}"])]
    assert labels == ["out", "b"]


def test_the_tool(tmp_path, capsys):
    mine = write(tmp_path / "mine/mmeb", summary(A=0.5, B=0.25))
    write(tmp_path / "mine/digits", summary("digits", C=0.5))
    base = write(tmp_path / "base", summary(A=0.25, B=0.75))
    command = ["--evaluation", str(tmp_path / "mine"), "--baseline", base]
    assert compare_evaluations.main([*command, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out/table.txt").read_text() == printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["B", "precision@1", "25.0", "75.0", "-50.0"] in rows
    assert ["overall", "37.5", "50.0", "-12.5"] in rows
    page = (tmp_path / "out/report.html").read_text()
    assert ">-50.0</td>" in page
    assert "<h2><bdi>digits</bdi></h2>" in page
    assert compare_evaluations.main([*command, mine, "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    command = [*command[:3], str(tmp_path / "nothing"), "--output", str(tmp_path / "none")]
    assert compare_evaluations.main(command) == 2
    assert "nothing: no summary.json here" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_lower_rank_is_a_gain_on_the_page(tmp_path):
    """And a lower score is a loss."""
    folders = []
    for name, score, rank in (("mine", 0.25, 3.0), ("base", 0.5, 4.5)):
        content = summary("msvd", v2t=score, averages={})
        content["tasks"]["v2t"]["metrics"] |= {"precision@1": score, "median rank": rank}
        folders.append(write(tmp_path / name, content))
    command = ["--evaluation", folders[0], "--baseline", folders[1]]
    assert compare_evaluations.main([*command, "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    cells = re.findall(r'<td class="([^"]*)"[^>]*>(-[\d.]+)</td>', page)
    kinds = {value: {"good", "bad"} & set(names.split()) for names, value in cells}
    assert kinds == {"-25.0": {"bad"}, "-1.5": {"good"}}
