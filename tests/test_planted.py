"Script that is planted in captions, labels, file names, prompts and descriptions does not run in any page"
import os
import subprocess

import pytest
from planted import plant_suite


@pytest.fixture(scope="module")
def made(command, tmp_path_factory):
    "The pages of a suite, and the figures beside them"
    folder = tmp_path_factory.mktemp("planted")
    done = subprocess.run([command, "suite", plant_suite(folder), "--out", "reports", "--figures", "svg"], cwd=folder,
                          env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "reports" / "planted"


@pytest.mark.parametrize("rule", ["with", "without"])
def test_nothing_runs(made, browser, rule):
    "With the rule of the page that forbids script, and without it, since not every viewer knows it"
    files = [made / "index.html", *sorted(made.glob("*/report.html")), *sorted(made.glob("*/figures/*.svg"))]
    assert len(files) > 8
    context = browser.new_context(bypass_csp=rule == "without")
    tab = context.new_page()
    asked, dialogs = [], []
    tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else asked.append(r.url))
    tab.on("dialog", lambda d: dialogs.append(d.message) or d.dismiss())
    for file in files:
        tab.goto(file.as_uri())
        tab.evaluate("() => document.querySelectorAll('details').forEach(one => { one.open = true })")
        assert tab.evaluate("() => window.ran") is None, file
        found = tab.evaluate("() => [...document.querySelectorAll('script, iframe, [onload], [onerror], [onmouseover], "
                             "[href^=\"javascript\" i], [src=x]')].map(one => one.outerHTML)")
        assert found == [], file
    assert asked == dialogs == []
    context.close()


def test_what_was_planted_is_shown_as_text(made):
    "It has not been left out either"
    page = (made / "audit" / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;window.ran" in page and "iframe srcdoc=" in page
