"""How Sphinx builds the site from the pages that pages.py wrote: `make site`."""
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import myst_nb.sphinx_ext

sys.path.insert(0, str(Path(__file__).parent))
from pages import CFG, LIBRARY, NBS  # after the line above

from ris_nb.course.editions import FOR_TEACHERS, PUBLISHED, student_edition

project, author, release = CFG["lib_name"], CFG["author"], CFG["version"]
copyright = CFG["copyright"]
extensions = ["myst_nb", "autodoc2", "sphinx.ext.mathjax", "sphinx.ext.githubpages"]

# Notebooks: as stored, never run.
myst_nb.sphinx_ext.OUTPUT_FOLDER = "build/figures"  # not jupyter_execute beside _site
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 6
myst_heading_slug_func = "pages.jupyter_slug"

# The library: read, not imported. pages.py names the objects, autodoc2 describes them.
autodoc2_index_template = None
suppress_warnings = ["autodoc2.dup_item"]  # checks of exercises are all called `_`; no page shows them
autodoc2_render_plugin = "pages.Renderer"
autodoc2_hidden_objects = ["private", "dunder", "inherited"]
autodoc2_class_docstring = "both"
autodoc2_docstring_parser_regexes = [(".*", "myst")]
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# Equations: MathJax from a Python package, so that nothing is fetched; tex-chtml needs its fonts alone.
mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static"
mathjax_path = "mathjax/tex-chtml.js"
exclude_patterns = [f"mathjax/{rest}" for rest in ("mml-*", "tex-mml-*", "tex-svg*", "tex-chtml-full*", "output/svg*", "output/svg/**", "node-main.js")]

html_theme = "sphinx_book_theme"
html_title = CFG["lib_name"]
html_use_index = False  # the page of the library lists all names
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["_static", str(mathjax)]
html_css_files, html_js_files = ["site.css"], ["site.js"]
html_favicon = str(Path(__file__).parent / "_static" / "mark.svg")
html_context = {"default_mode": "auto"}  # light or dark as the reader's machine is set
html_theme_options = {
    "repository_url": CFG["git_url"], "repository_branch": CFG["branch"], "path_to_docs": "nbs",
    "use_repository_button": True, "use_download_button": False, "navbar_persistent": [], "collapse_navigation": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com", "binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"},
}


def launch_without_solutions(app, pagename, templatename, context, doctree):
    """Let the rocket of an exercise open the student's edition: in Colab the published one, in Binder the one that binder/postBuild writes. No rocket for exams."""
    room, _, name = pagename.partition("/")
    if room not in ("exercises", "teaching"):
        return
    buttons = context.get("header_buttons", [])
    context["header_buttons"] = [group for group in buttons if name not in (*FOR_TEACHERS, "syllabus") or group.get("label") != "launch-buttons"]
    for button in (button for group in buttons for button in group.get("buttons", [])):
        if button.get("text") == "Colab":
            button["url"] = f"{PUBLISHED.replace('https://github.com', 'https://colab.research.google.com/github')}/nbs/{pagename}.ipynb"
        elif button.get("text") == "Binder":
            button["url"] = button["url"].replace("lab/tree/nbs/", "lab/tree/student/nbs/")


def add_students_edition(app, error):
    """Put the student's edition beside the pages, as a folder and as one file."""
    if error is None:
        folder = Path(app.outdir) / "student"
        shutil.rmtree(folder, ignore_errors=True)
        student_edition(NBS, folder)
        shutil.make_archive(str(folder), "zip", folder)


def setup(app):
    """Tell autodoc2 where the library lies, seen from the pages; add the student's edition."""
    app.connect("html-page-context", launch_without_solutions, priority=600)  # after the theme's own
    app.connect("build-finished", add_students_edition)
    app.config.autodoc2_packages = [{"path": Path(os.path.relpath(LIBRARY, app.srcdir)).as_posix(), "auto_mode": False,
                                     "exclude_files": ["_modidx.py", "ch[0-9][0-9].py"]}]
