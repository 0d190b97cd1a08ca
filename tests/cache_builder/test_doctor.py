"""The doctor finds what is missing, unfit or broken, and says what to do about it."""

import json
import resource
import sys

import pytest
from packaging.requirements import Requirement

from cache_builder import doctor, doctor_probes, requirements
from cache_builder.doctor import Finding, Report, judge_extra
from cache_builder.doctor_probes import Line, Probe, ask
from cache_builder.errors import ConfigError
from cache_builder.requirements import Found
from tests import plugins


def found(text, version):
    return Found(Requirement(text), version)


GOOD, OLD, GONE = found("a>=1", "1.2"), found("b>=2,<3", "1.9"), found("c>=1", None)


@pytest.mark.parametrize(
    ("demands", "is_required", "state", "value"),
    [
        ([GOOD], True, "ok", "1 requirements"),
        ([GOOD, GONE], False, "absent", "lacks c"),
        ([GOOD, GONE], True, "broken", "lacks c"),
        ([OLD, GONE], False, "weak", "does not fit: b 1.9 (needs <3,>=2)"),
        ([OLD, GONE], True, "broken", "does not fit: b 1.9 (needs <3,>=2)"),
    ],
)
def test_an_extra_is_whole_or_says_what_to_install(demands, is_required, state, value):
    finding = judge_extra("train", demands, is_required=is_required)
    assert (finding.state, finding.value) == (state, value)
    assert finding.hint == ("" if state == "ok" else "pip install -U 'patchcache[train]'")


def probe(code):
    return Probe("thing", ("thing",), code, "install thing again")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise OSError('libthing.so.1: cannot open')", "OSError: libthing.so.1: cannot open"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import sys; sys.exit(3)", "exit status 3"),
    ],
)
def test_a_library_that_does_not_survive_its_use_is_found_out(code, problem):
    before = "tell('thing', 'ok', '1.0')\n"
    (answer,) = ask([probe(before + code)])
    assert answer.lines == (Line("thing", "ok", "1.0"),)
    assert answer.problem == problem


def test_what_libraries_print_is_no_finding():
    code = "print('[thing] initialised')\ntell('thing', 'ok', '1.0')\nprint('[1, 2]')"
    (answer,) = ask([probe(code)])
    assert answer == ((Line("thing", "ok", "1.0"),), "")


def test_a_library_that_hangs_is_found_out(monkeypatch):
    monkeypatch.setattr(doctor_probes, "_PATIENCE_S", 0.2)
    (answer,) = ask([probe("import time; time.sleep(600)")])
    assert answer.problem == "hung for 0.2 s"


def with_probes(monkeypatch, *probes):
    monkeypatch.setattr(doctor_probes, "PROBES", probes)
    real = requirements.installed_version
    monkeypatch.setattr(
        requirements, "installed_version", lambda name: "1.0" if name == "thing" else real(name)
    )


def test_a_broken_library_fails_the_command_and_comes_with_a_hint(monkeypatch, patchcache):
    with_probes(monkeypatch, probe("raise ImportError('no symbol')"))
    done = patchcache("doctor")
    assert done.status == 1
    assert "broken thing" in done.out
    assert "-> install thing again" in done.out
    assert done.out.splitlines()[-1].startswith("1 broken, ")


def test_what_nobody_asked_for_does_not_fail_the_command(monkeypatch, patchcache):
    with_probes(monkeypatch, probe("tell('thing', 'weak', 'slow', 'get a faster one')"))
    done = patchcache("doctor", "--json")
    report = json.loads(done.out)
    assert (done.status, report["is_well"]) == (0, True)
    thing = {"group": "Libraries", "name": "thing", "state": "weak", "value": "slow",
             "hint": "get a faster one"}  # fmt: skip
    assert thing in report["findings"]
    groups = {finding["group"] for finding in report["findings"]}
    assert {"Program", "Extras", "Libraries", "Machine"} <= groups


def test_an_extra_that_does_not_exist_is_refused(patchcache):
    done = patchcache("doctor", "--require", "trian")
    assert done.status == 1
    assert "no extra 'trian'" in done.err
    assert "train" in done.err


def test_sources_that_are_not_installed_are_broken(monkeypatch):
    with_probes(monkeypatch)
    monkeypatch.setattr(requirements, "ours", lambda: None)
    report = doctor.run([])
    assert not report.is_well
    assert "sources that are not installed" in "\n".join(report.lines())
    with pytest.raises(ConfigError, match=r"--require train: .*pip install \."):
        doctor.run(["train"])


def test_little_room_and_few_open_files_are_weak(monkeypatch, tmp_path):
    (finding,) = doctor.judge_space("scratch", tmp_path, 10**30, "buy a disk")
    assert finding.state == "weak"
    assert finding.hint.endswith("TB: buy a disk, or make room")
    (finding,) = doctor.judge_space("scratch", tmp_path, 1, "buy a disk")
    assert (finding.state, finding.hint) == ("ok", "")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 1024))
    finding = doctor._open_files()
    assert (finding.state, finding.value) == ("weak", "256 at most")
    assert "ulimit -n 65536 (up to 1,024 without root)" in finding.hint


def test_installed_tokenizers_are_listed(tmp_path, monkeypatch):
    with_probes(monkeypatch)
    with plugins.on_path(plugins.offer(tmp_path, "", distribution="kd", vqkd="load")):
        assert Finding("Tokenizers", "vqkd", "ok", "kd 1.5") in doctor.run([]).findings


@pytest.mark.slow
def test_this_machine_is_well(patchcache):
    done = patchcache("doctor", "--json")
    assert done.out, done.err
    report = json.loads(done.out)
    states = {finding["name"]: finding for finding in report["findings"]}
    assert done.status == 0, report
    assert states["python"]["value"].endswith(sys.executable)
    for name in ("torch", "kernel", "JPEG decoder", "faiss", "ray"):
        assert states[name]["state"] in ("ok", "weak"), states[name]
    assert "images/s per core" in states["JPEG decoder"]["value"]


def test_a_report_names_every_state():
    report = Report((Finding("A", "x", "ok", "1"), Finding("B", "long", "absent", "no", "get it")))
    assert list(report.lines()) == [
        "A", "  ok     x     1", "B", "  absent long  no", "               -> get it",
        "0 broken, 0 weak, 1 absent",
    ]  # fmt: skip
