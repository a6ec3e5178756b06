"""Promise: every recipe has the Pythons, the versions and the licence of pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "packaging").exists(), reason="needs the repository or the source distribution"
)


def text(path):
    return (ROOT / path).read_text()


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads(text("pyproject.toml"))


@pytest.fixture(scope="module")
def pythons(pyproject):
    """Return what cibuildwheel builds and tests with: "3.11", ..., "3.14t"."""
    return [
        re.fullmatch(r"cp3(\d+t?)-\*", build).expand(r"3.\1")
        for build in pyproject["tool"]["cibuildwheel"]["build"]
    ]


def bounds(requirements):
    """Return the least version of each requirement, without those for newer Pythons."""
    pairs = [re.split(r"\s*>=\s*", x) for x in requirements if ";" not in x]
    return dict(pairs)


def test_the_pythons_are_the_same_everywhere(pyproject, pythons):
    project = pyproject["project"]
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert [version for version in pythons if not version.endswith("t")] == classified
    assert any(version.endswith("t") for version in pythons)
    oldest = classified[0]
    assert project["requires-python"] == f">={oldest}"
    assert pyproject["tool"]["scikit-build"]["wheel"]["py-api"] == f"cp{oldest.replace('.', '')}"


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="needs the repository")
def test_the_workflow_tests_the_oldest_and_the_newest_python(pythons):
    workflow = text(".github/workflows/tests.yml")
    with_lock = [version for version in pythons if not version.endswith("t")]
    assert f'python: ["{with_lock[0]}", "{with_lock[-1]}"]' in workflow
    several = re.search(r"python-version: \|\n((?: +3\.\d+\n)+)", workflow)[1].split()
    assert {with_lock[0], with_lock[-1]} <= set(several)
    assert re.findall(r'python-version: "(3\.\d+t)"', workflow) == [pythons[-1]]


def test_numpy_of_the_newest_pythons(pyproject):
    """A bound with a marker is no lower than the ones of older Pythons."""
    found = [
        re.fullmatch(r"numpy>=([\d.]+)(?:; python_version >= '3\.(\d+)')?", x).groups()
        for x in pyproject["project"]["dependencies"]
    ]
    order = [(int(python or 0), [int(x) for x in bound.split(".")]) for bound, python in found]
    assert order == sorted(order)
    assert sorted(bound for _, bound in order) == [bound for _, bound in order]


def debian_packages(field):
    """Return the least upstream version of each package in a list of dependencies."""
    packages = {}
    for item in field.split(","):
        name, _, rest = item.strip().partition(" ")
        bound = re.search(r"\(>= (?:\d+:)?([\d.]+)\)", rest)
        packages[name] = bound and bound[1]
    return packages


def debian_fields(paragraph):
    fields = re.split(r"\n(?=\S)", text("packaging/debian/control").split("\n\n")[paragraph])
    return dict(re.split(r":\s*", field.strip(), maxsplit=1) for field in fields)


def debian_name(project):
    return {"cython": "cython3"}.get(project, f"python3-{project}")


def test_debian_s_recipe(pyproject):
    project = pyproject["project"]
    source, package = debian_fields(0), debian_fields(1)
    built_with = debian_packages(source["Build-Depends"])
    runs_with = debian_packages(package["Depends"])
    for name, bound in bounds(pyproject["build-system"]["requires"]).items():
        assert built_with[debian_name(name)] == bound
    for name, bound in bounds(project["dependencies"]).items():
        assert runs_with[debian_name(name)] == bound
    python = project["requires-python"].removeprefix(">=")
    assert built_with["python3-dev"] == runs_with["python3"] == python
    for needed in pyproject["dependency-groups"]["smoke"]:
        name, _, bound = needed.partition(">=")
        assert built_with[debian_name(name.replace("_", "-"))] == (bound or None)
    minimum = re.search(r"cmake_minimum_required\(VERSION ([\d.]+)\)", text("CMakeLists.txt"))[1]
    assert built_with["cmake"] == minimum
    assert source["Source"] == project["name"]
    assert package["Package"] == f"python3-{project['name']}"
    assert package["Description"].splitlines()[0] == project["description"]
    version = re.match(r"(\S+) \((.*)-\d+\) ", text("packaging/debian/changelog"))
    assert version.groups() == (project["name"], project["version"])
    # What a wheel has to pass is what this package has to pass.
    tested = re.findall(r"tests/(test_\w+\.py)", text("packaging/debian/rules"))
    assert tested == re.findall(
        r"tests/(test_\w+\.py)", pyproject["tool"]["cibuildwheel"]["test-command"]
    )


def test_debian_s_copyright_is_the_licence(pyproject):
    written = text("packaging/debian/copyright")
    assert f"\nLicense: {pyproject['project']['license']}\n" in written
    licence = text("LICENSE")
    holder = re.search(r"Copyright \(c\) (\d+), (.*)", licence)
    assert f"\nCopyright: {holder[1]} {holder[2]}\n" in written

    def words(paragraphs):
        return [word for word in paragraphs.split() if word != "."]

    conditions = licence.partition(holder[0])[2]
    assert words(written)[-len(words(conditions)) :] == words(conditions)


def conda_recipe(platform):
    """Return the recipe as rattler-build understands it."""
    rattler_build = pytest.importorskip("rattler_build")
    recipe = rattler_build.Stage0Recipe.from_file(ROOT / "packaging/conda/recipe.yaml")
    variants = rattler_build.VariantConfig({"c_stdlib": ["sysroot"], "cxx_compiler": ["gxx"]})
    target = rattler_build.PlatformConfig(target_platform=platform)
    (rendered,) = recipe.render(variants, rattler_build.RenderConfig(platform=target))
    return rendered.recipe.to_dict()


@pytest.mark.parametrize("platform", ["linux-64", "linux-aarch64", "osx-arm64"])
def test_conda_s_recipe(pyproject, platform):
    project, recipe = pyproject["project"], conda_recipe(platform=platform)
    needed = recipe["requirements"]
    python = f"python {project['requires-python']}"
    expected = {f"{k} >={v}" for k, v in bounds(pyproject["build-system"]["requires"]).items()}
    assert set(needed["host"]) == expected | {python, "pip"}
    expected = {f"{k} >={v}" for k, v in bounds(project["dependencies"]).items()}
    assert set(needed["run"]) == expected | {python}
    minimum = re.search(r"cmake_minimum_required\(VERSION ([\d.]+)\)", text("CMakeLists.txt"))[1]
    assert f"cmake >={minimum}" in needed["build"]
    assert f"gxx_{platform}" in needed["build"]
    assert recipe["package"] == {"name": project["name"], "version": project["version"]}
    about = recipe["about"]
    assert about["summary"] == project["description"]
    assert about["license"] == project["license"]
    assert about["license_file"] == project["license-files"]


# ---- what is not built --------------------------------------------------------------------------


def test_the_citation_has_the_version_and_the_licence(pyproject):
    yaml = pytest.importorskip("yaml")
    citation, project = yaml.safe_load(text("CITATION.cff")), pyproject["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["title"] == project["name"]
    assert citation["keywords"] == project["keywords"]
    assert citation["authors"] == [{"name": "The numattn developers"}]
    # Format 1.2.0 needs these, and no key that it does not know.
    needed = {"cff-version", "message", "title", "authors"}
    known = needed | {"abstract", "date-released", "keywords", "license", "type", "version"}
    assert needed <= set(citation) <= known | {"repository-code", "url"}


def test_the_changelog_begins_with_this_version(pyproject):
    first = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", text("CHANGELOG.md"), re.M)
    assert first[1] == pyproject["project"]["version"]
    if first[2] != "unreleased":
        assert f"date-released: {first[2]}\n" in text("CITATION.cff")


def test_the_licence_is_an_expression_with_its_files(pyproject):
    """PEP 639."""
    project = pyproject["project"]
    assert isinstance(project["license"], str)
    assert all((ROOT / name).is_file() for name in project["license-files"])
    assert not any(line.startswith("License ::") for line in project["classifiers"])


@pytest.mark.skipif(not (ROOT / ".pre-commit-config.yaml").exists(), reason="needs the repository")
def test_pre_commit_runs_the_tools_of_make_lint(pyproject):
    yaml = pytest.importorskip("yaml")
    hooks = [
        hook
        for repository in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
        for hook in repository["hooks"]
    ]
    pinned = {x for x in pyproject["dependency-groups"]["lint"] if "==" in x}
    assert {x for hook in hooks for x in hook.get("additional_dependencies", [])} == pinned
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", text("Makefile"), re.M)[1]
    for hook in hooks:
        command = hook["entry"].replace(" --force-exclude", "")
        assert command == "make lint" or f"$(BIN)/{command} " in f"{recipe} ".replace("\n", " ")


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="needs the repository")
@pytest.mark.parametrize("name", ["bug", "question", "feature"])
def test_forms_ask_for_something(name):
    """What their schema, which `make lint` checks, does not say."""
    yaml = pytest.importorskip("yaml")
    body = yaml.safe_load(text(f".github/ISSUE_TEMPLATE/{name}.yml"))["body"]
    fields = [part for part in body if part["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations") == {"required": True} for field in fields)
