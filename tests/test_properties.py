"""Whatever YAML holds: a parameter or a suite file is read as declared, or refused by name"""
import json
from copy import deepcopy
from datetime import date
from pathlib import Path

import pytest
import yaml

from medclip_nb.core import InputError
from medclip_nb.experiments.parameters import check_parameters, template_parameters, templates
from medclip_nb.experiments.suites import load_suite

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
QUICK = settings(max_examples=150, deadline=None, derandomize=True, database=None,
                 suppress_health_check=[*HealthCheck])
FEW = settings(QUICK, max_examples=60)
SUITES = {p.name: yaml.safe_load(p.read_text(encoding="utf-8"))
          for p in sorted((ROOT / "nbs/experiments/suites").glob("*.yaml"))}
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 10**6), st.floats(), st.text(max_size=8), st.dates(),
    st.binary(max_size=4),
    st.sampled_from([3000, 20_000]).map(lambda bits: 2**bits),
    st.sampled_from([10**30, -1, "", "none", "[a", "{a: b}", "a\0", "\ud800", "nan", {1}]))
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5) | st.integers(0, 5), inner, max_size=3)),
    max_leaves=6)
PARAMETERS = [(t, name) for t in templates() for name in template_parameters(t) if name != "out_dir"]


def fits(value, kind):
    "Whether a value is of the type that a template declares"
    kinds = [k.strip().partition("[") for k in kind.strip("'\"").replace(" or ", "|").split("|")]
    of = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict, "None": type(None)}
    return any(type(value) is of[outer] and (not inner or all(type(v) is of[inner[:-1]] for v in value))
               for outer, _, inner in kinds)


@QUICK
@given(st.sampled_from(PARAMETERS), VALUES)
def test_any_value_is_of_the_declared_type_or_refused_by_name(which, value):
    template, name = which
    try: found = check_parameters(template, {name: value}, complete=False)[name]
    except InputError as error:
        assert repr(name) in str(error) or f"{name}=" in str(error)
        assert len(str(error)) < 1000 and str(error).startswith(template)
    else:
        assert fits(found, template_parameters(template)[name].type), found
        json.dumps(found, allow_nan=False).encode()


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-10, 100), st.floats(-1, 1), st.text("ab{}/. :", max_size=6),
                  st.just(date(2020, 1, 1)), st.lists(st.integers(0, 3), max_size=2),
                  st.dictionaries(st.sampled_from(["name", "params", "lr", "metric"]), st.integers(0, 3), max_size=2))


def places(tree, path=()):
    "The path of every value in a tree"
    for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(tree, path, how, value):
    "A copy of a tree with one value replaced, removed, doubled, or under another name"
    tree = deepcopy(tree)
    at = tree
    for key in path[:-1]: at = at[key]
    key, old = path[-1], at[path[-1]]
    if how == "replace": at[key] = value
    elif how == "remove": del at[key]
    elif how == "wrap": at[key] = [old]
    elif isinstance(at, list): at.append(deepcopy(old))
    else: at[f"{key}s"] = at.pop(key)
    return tree


@FEW
@given(st.sampled_from([*SUITES]), st.data(), st.sampled_from(["replace", "remove", "wrap", "other"]), PLAIN)
def test_a_changed_suite_is_a_plan_or_refused_with_its_place(tmp_path_factory, name, data, how, value):
    whole = SUITES[name]
    path = data.draw(st.sampled_from([*places(whole)]))
    file = tmp_path_factory.getbasetemp() / name
    file.write_text(yaml.safe_dump(changed(whole, path, how, value)), encoding="utf-8")
    try: found = load_suite(file)
    except InputError as error:
        assert 10 < len(str(error)) < 20_000 and "Traceback" not in str(error)
        assert name in str(error) or any(str(part) in str(error) for part in path), error
    else:
        assert found.runs and all(r.template and isinstance(r.params, dict) for r in found.runs)
