"""The documentation: short, in plain sentences, and true of the code.

The site itself is built by `make docs`, which checks the links between pages.
"""

import ast
import dataclasses
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayseg import config, manual
from rayseg.client import FORMATS
from rayseg.evaluation import metrics
from rayseg.records import LEDGER, MANIFEST, PREPARED, REJECTS
from tests.unit.documentation import (
    DOCS,
    GUIDES,
    PAGES,
    README,
    ROOT,
    Command,
    blocks,
    commands,
    generated,
    recipes,
    routes,
    sentences,
    words,
)

MAKEFILE = (ROOT / "Makefile").read_text()
WHOLE_RECIPE = {"tune", "crossvalidate", "demo"}  # their keys begin with the section
# Sentences that had to be read twice.
RIDDLES = (
    "what a mask holds without a class",
    "that a mask's pattern takes is no image",
    "Of whatever the space does not name",
    "the signs are turned",
    "a patient's place depends on",
    "left out; 0",
    "independent of their company",
    "none that a browser sends for another site",
    "is wanted of one node",
    "make no single series",
)
# Programs of others, which no test can run as they stand: they need a cluster, a cloud, a store or the network.
OTHERS = {
    *(".", "alias", "apt-get", "aws", "echo", "export", "mlflow", "openssl", "pg_dump", "pip", "printf", "prometheus"),
    *("python3.11", "ray", "rm", "serve", "set", "sha256sum", "sqlite3", "cut", "umask", "kubectl", "gpu/bin/pip"),
}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _sources(end: str) -> list[Path]:
    return [path for folder in ("platform", "serving", "jobs") for path in ROOT.glob(f"{folder}/**/*.{end}")]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def job(section: str) -> tuple[type[Any], bool]:
    """The configuration of a job, and whether its keys begin with a section."""
    source = read(ROOT / "jobs" / f"{section}.py")
    (class_name,) = re.findall(r'job\.run\("\w+", (\w+), ', source)
    return getattr(importlib.import_module(f"jobs.{section}"), class_name), section in WHOLE_RECIPE


def test_the_readme_is_read_in_five_minutes() -> None:
    assert words(read(README)) <= 900


@pytest.mark.parametrize("page", [page for page in GUIDES if page.parent.name == "how-to"], ids=name)
def test_a_task_is_a_short_page(page: Path) -> None:
    assert words(read(page)) <= 400


@pytest.mark.parametrize("page", [README, *GUIDES], ids=name)
def test_sentences_are_short(page: Path) -> None:
    assert [sentence for sentence in sentences(page) if words(sentence) > 35] == []


def test_sentences_that_had_to_be_read_twice_do_not_come_back() -> None:
    shown = [README, *PAGES, *(path for end in ("py", "js", "html") for path in _sources(end))]
    told = [(name(page), riddle) for page in shown for riddle in RIDDLES if riddle in " ".join(read(page).split())]
    assert told == []


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", read(page)):
            assert "://" in target or (page.parent / target).exists(), (name(page), target)


def test_every_page_is_listed_on_the_first_one() -> None:
    listed = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)]+)\)", read(DOCS / "index.md"))}
    jobs = {DOCS / "reference/jobs" / f"{section}.md" for section in config.SECTIONS}
    assert listed == set(PAGES) - {DOCS / "index.md"} - jobs


def test_the_picture_of_imports_is_what_import_linter_checks() -> None:
    layers = tomllib.loads(read(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = " ".join(read(DOCS / "explanation/code.md").rpartition("```text\n")[2].partition("```")[0].split())
    assert shown.split(" > ") == [layer.replace("rayseg.", "") for layer in layers]


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    cited = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in read(ROOT / "LICENSE")
    assert project["license-files"] == ["LICENSE", "NOTICE"]


def test_pictures_are_shown_and_shown_pictures_are_there() -> None:
    shown = {
        (page.parent / path).resolve()
        for page in (README, *PAGES)
        for path in re.findall(r"!\[.*?\]\((.*?)\)", read(page))
    }
    assert shown == {ROOT / "report.png", *DOCS.rglob("*.png")}


GUIDED = [command for page in (README, *GUIDES) for command in commands(page)]


def inner(command: Command) -> Command:
    """The job of a line that submits it, or names its interpreter."""
    found = list(command.words)
    if found[0] == "rayseg" and found[1] in manual.JOBS and "--help" not in found:
        found = ["python", "-m", f"jobs.{found[1]}", *found[2:]]
    elif found[0] == "submit":
        found = ["python", "-m", *found[1:]]
    elif found[:3] == ["ray", "job", "submit"] and "--" in found:
        found = found[found.index("--") + 1 :]
    return dataclasses.replace(command, words=tuple(found))


def test_commands_are_found() -> None:
    assert len(GUIDED) > 120
    assert {"make", "rayseg", "curl", "submit"} <= {command.words[0] for command in GUIDED}


@pytest.mark.parametrize("command", GUIDED, ids=lambda command: f"{command.page.stem}: {' '.join(command.words)[:60]}")
def test_a_command_is_one_that_works(command: Command) -> None:
    command = inner(command)
    program = command.words[0]
    if program == "python":
        check_job(command)
    elif program == "make":
        check_make(command)
    elif program == "curl":
        check_request(command)
    elif program == "rayseg":
        check_command(command)
    else:
        # A command that we know nothing of is to be checked above, or named there.
        assert program in OTHERS, command.line
    for word in command.words:
        if re.match(r"(configs|requirements)[-./]", word) and "*" not in word:
            assert (ROOT / word).exists(), word


def check_command(command: Command) -> None:
    name = command.words[1]
    assert name in {"--help", *manual.COMMANDS, *manual.JOBS}
    if name == "ask":
        assert command.option("--format") in FORMATS
    if name == "run":
        assert command.words[2] in {recipe for page in GUIDES for recipe in recipes(page)}


def check_job(command: Command) -> None:
    """Each key exists and takes its value, in the recipe that the line names, or in the demo's."""
    assert command.words[1] == "-m"
    section = command.words[2].removeprefix("jobs.")
    config_class, whole = job(section)
    recipe = command.option("--config")
    saved = {name: values for page in GUIDES for name, values in recipes(page).items()}
    if recipe in saved:
        values = saved[recipe]
    elif recipe == "work/brain-tumor-sweep/best.yaml":
        values = yaml.safe_load(read(ROOT / "configs/brain-tumor-mri-sweep.yaml"))
    elif recipe is not None:
        assert recipe.startswith("configs/"), recipe
        values = yaml.safe_load(read(ROOT / recipe))
    else:
        values = {}
    if "MLFLOW_TRACKING_URI" in command.line:
        values = {"common": {"tracking_uri": "sqlite:///work/mlflow.db"}, **values}
    config.of_recipe(config_class, None if whole else section, values, command.settings)


def check_make(command: Command) -> None:
    (targets,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    for word in command.words[1:]:
        if word == "#":
            return
        variable, equals, _ = word.partition("=")
        if equals:
            assert f"$({variable})" in MAKEFILE or f"$(if $({variable})" in MAKEFILE, word
        else:
            assert word in targets.split(), word


def check_request(command: Command) -> None:
    """The route exists, with the method, and takes the parameters."""
    (address,) = [word for word in command.words if word.startswith("http://127.0.0.1:8000")]
    path, _, query = address.removeprefix("http://127.0.0.1:8000").partition("?")
    sends = any(option in command.words for option in ("-d", "-F", "--data-binary"))
    method = (command.option("-X") or ("POST" if sends else "GET")).lower()
    known = routes()
    (route,) = [
        route for route in known if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route), path) and method in known[route]
    ]
    parameters = {one["name"] for one in known[route][method].get("parameters", [])}
    assert {part.partition("=")[0] for part in query.split("&") if part} <= parameters


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name)
def test_recipes_are_ones_that_jobs_take(page: Path) -> None:
    """Sections of examples are taken by their jobs, with the demo's values for what an example leaves out."""
    demo = yaml.safe_load(read(ROOT / "configs/demo.yaml"))
    demo["diff"] = {"baseline": "a", "challenger": "b", "manifest": "c", "output": "d"}
    for block in blocks(page, "yaml"):
        recipe = yaml.safe_load(block)
        common = recipe.pop("common", {})
        for section, values in recipe.items():
            config_class, whole = job(section)
            if whole:
                config_class = {field.name: field.type for field in dataclasses.fields(config_class)}[section]
            base = demo.get(section, {}) if page not in (DOCS / "start/pictures.md", DOCS / "start/dicom.md") else {}
            base = {
                key: value
                for key, value in base.items()
                if not (section == "segment" and "source" in values and key == "manifest")
            }
            config.of_recipe(config_class, section, {"common": common, section: {**base, **values}})


@pytest.mark.parametrize("section", sorted(config.SECTIONS))
def test_every_key_of_a_job_is_listed_with_its_meaning(section: str) -> None:
    assert f"<!-- generated: keys {section} -->" in read(DOCS / "reference/jobs" / f"{section}.md")
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \| (.*) \|$", generated(f"keys {section}"), re.MULTILINE)
    listed = {key: default for key, _, default, _ in rows}
    config_class, whole = job(section)
    keys = dict(_keys(config_class, "", whole))
    assert listed.keys() == keys.keys()
    for key, field in keys.items():
        default = listed[key]
        assert (default == "(needed)") == (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ), key
        if isinstance(field.default, int | float | str) and field.default != "":
            assert default == f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`", (
                key
            )
    assert [key for key, _, _, meaning in rows if not meaning.strip()] == []


def _keys(config_class: type[Any], prefix: str, whole: bool) -> list[tuple[str, Any]]:
    found = []
    for field in dataclasses.fields(config_class):
        found.append((f"{prefix}{field.name}", field))
        inner = [one for one in config._dataclasses_of(field.type) if one.__name__ != "Window"]
        if inner and not (whole and inner[0].__name__.endswith("Config")):
            found += _keys(inner[0], f"{prefix}{field.name}.", False)
    return found


def test_columns_are_those_of_the_schemas() -> None:
    for schema, what in ((MANIFEST, "MANIFEST"), (PREPARED, "PREPARED"), (LEDGER, "LEDGER"), (REJECTS, "REJECTS")):
        assert f"<!-- generated: columns rayseg.records {what} -->" in read(DOCS / "reference/tables.md")
        rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", generated(f"columns rayseg.records {what}"), re.MULTILINE)
        assert [column for column, _ in rows] == schema.names
        assert [column for column, meaning in rows if not meaning] == []


def test_examples_in_python_are_whole_and_import_what_there_is() -> None:
    """Those of how-to/read-results run against a store in tests/e2e/test_tables.py."""
    found = [block for page in PAGES for block in blocks(page, "python")]
    assert len(found) > 5
    for block in found:
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_metric_is_defined() -> None:
    page = read(DOCS / "reference/metrics.md")
    defined = {
        part for cell in re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE) for part in re.findall(r"`(\w+)", cell)
    }
    defined |= set(re.findall(r"`(cases_\w+)`", page)) | {"lesions_false", "false_positive_ml", "false_positive_px"}
    for metric in metrics.METRICS:
        stem = re.sub(r"(_pooled|_per_case|_per_empty_case)$", "", metric)
        assert {stem, re.sub(r"_(mm|px|ml)$", "", stem)} & defined, metric


def test_variables_of_ours_are_listed() -> None:
    sources = [*ROOT.glob("platform/**/*.py"), *ROOT.glob("serving/*.py")]
    used = {word for path in sources for word in re.findall(r"\bRAYSEG_[A-Z_]*[A-Z]\b", read(path))}
    listed = set(re.findall(r"`(RAYSEG_[A-Z_]+)`", read(DOCS / "reference/environment.md")))
    assert used - {"RAYSEG_DICOMWEB", "RAYSEG_CODE_SILENT"} <= listed
    # `pacs` puts these names together.
    kinds = re.findall(r'_secret\("(\w+)"\)', read(ROOT / "platform/rayseg/pacs.py"))
    pacs = {f"RAYSEG_DICOMWEB_{kind}{end}" for kind in kinds for end in ("", "_FILE")} | {"RAYSEG_DICOMWEB_USER"}
    assert pacs <= listed
    assert listed <= used | pacs
