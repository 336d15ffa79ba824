"""Sphinx's settings for the site; docs/make_site.py writes the pages and calls it"""
import re
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docutils import nodes  # noqa: E402
from latex2mathml.converter import convert  # noqa: E402
from notebooks import repository, settings, source_link  # noqa: E402
from sphinx.search.en import SearchEnglish  # noqa: E402

project = settings()["lib_name"]
author = settings()["author"]
copyright = settings()["copyright"]
version = release = settings()["version"]
language = "en"
smartquotes = False  # Options and values stand in the prose as they are typed

extensions = ["myst_nb", "sphinx.ext.linkcode", "sphinx_copybutton", "sphinx_design"]
nb_execution_mode, nb_merge_streams = "off", True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "deflist"]
myst_heading_anchors = 4
myst_ref_domains = ["std", "py"]  # Those in use; else each link is parsed as C++ as well
myst_dmath_double_inline = True
# Outputs may have headings of any level; a report in a browser needs no static twin of its widgets
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
add_module_names = False
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"

html_theme, html_title = "pydata_sphinx_theme", project
html_static_path, html_css_files, html_js_files = ["static"], ["site.css"], ["site.js"]
html_favicon = "static/mark.svg"
html_show_sourcelink = html_copy_source = html_show_sphinx = False
html_show_search_summary = True  # site.js turns it off where pages come from a disk
html_use_index = html_domain_indices = False  # There is an index by wing
html_math_renderer = "mathml"
html_permalinks_icon = "#"
exclude_patterns = ["_build"]
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": project, "image_light": "_static/mark.svg", "image_dark": "_static/mark.svg", "alt_text": ""},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navigation_depth": 3,
    "collapse_navigation": True,  # Else every page holds the whole contents, and the build takes twice as long
    "show_nav_level": 1,
    "show_toc_level": 2,
    "show_prev_next": True,
    "secondary_sidebar_items": {"**": ["page-toc"], "datasets/index": [], "prompts/index": []},
    "icon_links": [{"name": "Repository", "url": repository("."), "icon": "fa-brands fa-github"}],
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": ["not-clinical"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "back_to_top_button": True,
}
html_sidebars = {page: [] for page in ("index", "start", "howto", "scaling", "glossary", "faq", "changelog", "cite",
                                       "contributing", "results", "speed")}
templates_path = ["templates"]


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    return source_link(info["module"], info["fullname"])


def inline_math(self, node):
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(self, node):
    self.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def plain_titles(app, pagename, templatename, context, doctree):
    "The home page is named as the project, not 'project - project'"
    context["title"] = re.sub(r"<[^>]+>", "", context.get("title") or "")


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("html-page-context", plain_titles)
    SearchEnglish.stem = cache(SearchEnglish.stem)  # Pages share most of their words
    return {"parallel_read_safe": True, "parallel_write_safe": True}
