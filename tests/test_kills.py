"The campaign of kills.py finds what a kill can do, and finds nothing where a command stands it"
import random

import kills
import pytest

STEPS = 'for i in 1 2 3 4 5 6 7 8; do printf x >> "$F"; sleep 0.05; done\n'
SCRIPTS = {
    "whole": 'F="$1/.half"; : > "$F"\n' + STEPS + 'mv "$F" "$1/table.csv"\n',
    "half": 'F="$1/table.csv"; : > "$F"\n' + STEPS,
    "litter": 'F="$1/.$$"\n' + STEPS + 'mv "$F" "$1/table.csv"\n',
    "orphan": 'F="$1/.half"; : > "$F"; [ -e "$1/../once" ] || setsid sleep 30 & touch "$1/../once"\n' + STEPS
              + 'mv "$F" "$1/table.csv"\n',
    "other": 'F="$1/.half"; [ -e "$F" ] || : > "$F"\n' + STEPS + 'mv "$F" "$1/table.csv"\n'}


@pytest.mark.parametrize("name, fault", [("whole", ""), ("half", "half of out/table.csv was left"), ("litter", "left"),
                                         ("orphan", "lives on"), ("other", "differs from an undisturbed run")])
def test_the_campaign_finds_what_a_kill_does(tmp_path, monkeypatch, name, fault):
    monkeypatch.setitem(kills.COMMANDS, "plain", lambda made, out: [out])
    monkeypatch.setattr(kills, "LASTS", 1.0)
    (script := tmp_path / name).write_text("#!/bin/sh\n" + SCRIPTS[name])
    script.chmod(0o755)
    reference = kills.Reference({"out/table.csv": b"x" * 8}, {"out/table.csv", "once"}, 0.5, 0)
    if name != "orphan": reference = kills.undisturbed("plain", str(script), tmp_path, tmp_path / "undisturbed")
    assert reference.expected == {"out/table.csv": b"x" * 8}
    found = [kills.once("plain", str(script), tmp_path, tmp_path / f"trial-{n}", reference, random.Random(n))
             for n in range(4)]
    faults = [text for _, faults in found for text in faults]
    assert any(fault in text for text in faults) if fault else not faults, found
