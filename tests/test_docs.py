"""What the documentation names is there: tests, files, commands, flags, log keys and links."""

import ast
import dataclasses
import functools
import re
import subprocess
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from latentvae.cli.flags import flag_name
from latentvae.cli.main import COMMANDS, COMMANDS_OF_RUNS
from latentvae.config.presets import load_preset, preset_names
from latentvae.config.run_config import JobConfig, flat, option_names
from latentvae.data import open_source
from latentvae.tasks.autoencoder.config import TrainConfig
from latentvae.tasks.distill.config import DistillConfig
from latentvae.tasks.flow.config import LatentFlowConfig
from latentvae.tasks.likelihood.config import LikelihoodConfig
from latentvae.tasks.prior.config import PriorConfig
from tests.proofs.mutations import MUTATIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALL_PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FAULTS = sorted((ROOT / "docs" / "faults").glob("*.md"))
SCHEMAS: dict[str, type[JobConfig]] = {
    "train": TrainConfig,
    "train-prior": PriorConfig,
    "train-flow": LatentFlowConfig,
    "train-tiny": DistillConfig,
    "train-vae": LikelihoodConfig,
}
SWITCHES = {"config", "preflight", "recipe", "help"}  # of the training scripts, beside the options
OTHER_PROGRAMS = set(
    "cpu dynamo_backend gpus-per-node init logdir machine_rank main_process_ip main_process_port "
    "max_restarts multi_gpu nnodes no-deps nproc_per_node ntasks-per-node num_machines "
    "num_cpu_threads_per_process num_processes opt_out private rdzv_backend rdzv_endpoint rdzv_id "
    "signal hub_token".split()
)
"""Flags of accelerate, torchrun, SLURM, pip, tensorboard and diffusers' scripts."""


def test_every_test_that_a_page_names_exists() -> None:
    named = {
        found
        for page in PAGES
        for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
    }
    assert len(named) > 90
    for path, name in sorted(named):
        tree = ast.parse((ROOT / path).read_text())
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, (path, name)


def faults(page: str) -> list[str]:
    """The faults of a page: each from its bold number to the next one or to a heading."""
    text = (ROOT / "docs" / "faults" / f"{page}.md").read_text()
    return re.findall(r"^\*\*\d+\w?\.\*\* .*?(?=^\*\*\d|^## |\Z)", text, re.M | re.S)


def test_every_fault_has_a_test_or_a_reason() -> None:
    counts = {"diffusers": 11 + 12, "taming": 12, "files": 16, "machine": 7 + 8}
    assert {page.stem for page in FAULTS} == set(counts)
    for page, count in counts.items():
        assert len(faults(page)) == count, page
        for fault in faults(page):
            assert re.search(r"::test_|Cannot occur: |Caught before", fault), fault


def test_the_checks_that_faults_name_are_those_that_find_them() -> None:
    pages = faults("diffusers") + faults("taming")
    tables = zip(("A", "V", "T"), (11, 12, 12), strict=True)  # the third counts 8a to 8e
    keys = [f"{letter}{i}" for letter, n in tables for i in range(1, n + 1)]
    named: dict[str, set[str]] = {}
    for key, fault in zip(keys, pages, strict=True):
        last = key if key[0] != "T" else f"T{min(int(key[1:]), 8)}"
        found = re.findall(r"`([\w-]+)`", fault.partition("**preflight:**")[2])
        named.setdefault(last, set()).update(found)
    for mutation in MUTATIONS:
        if mutation.fault:
            assert mutation.fails[0] in named[mutation.fault], mutation.name
    checks = {name for mutation in MUTATIONS for name in mutation.fails}
    assert {name for found in named.values() for name in found} <= checks
    page = (ROOT / "docs" / "preflight.md").read_text()
    assert all(f"`{name}`" in page for name in checks)


def code_of(page: Path) -> list[str]:
    """Return the lines of code of a page, inline code included, each command on one line."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        for part in [token, *(token.children or [])]:
            if part.type in ("code_block", "fence", "code_inline"):
                found += re.sub(r"\\\n\s*", "", part.content).splitlines()
    return [re.sub(r"(?:^#SBATCH|\s#\s).*", "", line).strip() for line in found]


def commands(pattern: str) -> list[tuple[str, str, str]]:
    """Return (page, what the pattern's group found, arguments) of each command on the pages."""
    lines = [(page.name, line) for page in PAGES for line in code_of(page)]
    found = [(page, line, re.search(pattern, line)) for page, line in lines]
    return [(page, match[1], line[match.end() :]) for page, line, match in found if match]


def flags_in(text: str) -> set[str]:
    """Return the flags of a text, without `no_`."""
    flags = re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)
    return {flag.removeprefix("no_") for flag in flags}


@functools.cache
def presets() -> frozenset[str]:
    return frozenset(preset_names(TrainConfig))


@functools.cache
def options_of(preset: str, schema: type[JobConfig] = TrainConfig) -> set[str]:
    """Return the options that a preset has, or all that any preset of the task has."""
    schema = next((s for s in SCHEMAS.values() if preset in preset_names(s)), schema)
    known = preset in preset_names(schema)
    return SWITCHES | set(flat(load_preset(preset, schema)) if known else option_names(schema))


def test_training_commands_have_presets_and_flags_that_exist() -> None:
    found = commands(r"train/train_(kl|vq)\.py(?=\s)")
    assert len(found) > 15
    for page, script, arguments in found:
        given = re.search(r"--config[ =](\S+)", arguments)
        name = given[1] if given else {"kl": "kl_small", "vq": "vq_small"}[script]
        assert name in presets() or name.endswith(".yaml"), (page, name)
        unknown = flags_in(arguments) - options_of(name if given else "")
        assert not unknown, (page, arguments, unknown)


def test_commands_of_latentvae_exist_with_their_flags() -> None:
    groups = "|".join({name.split()[0] for name in COMMANDS if " " in name})
    found = commands(rf"(?:^|\s)latentvae(?:\.cli)? ((?:(?:{groups}) )?[a-z][a-z-]+)(?=\s)")
    assert {name for _, name, _ in found} >= {"evaluate", "encode", "export", "preflight"}
    for page, name, arguments in found:
        if name in SCHEMAS:
            assert flags_in(arguments) <= options_of("", SCHEMAS[name]), (page, name, arguments)
            continue
        command = (COMMANDS | COMMANDS_OF_RUNS)[name]
        known = {flag_name(field) for field in dataclasses.fields(command)}
        if name in COMMANDS_OF_RUNS:
            known |= options_of(arguments.split()[0])
        assert flags_in(arguments) <= known, (page, name, arguments)


def test_benchmarks_that_pages_run_exist_with_their_flags() -> None:
    for page, name, arguments in commands(r"python benchmarks/(\w+\.py)"):
        source = (ROOT / "benchmarks" / name).read_text()
        assert all(re.search(rf"\b{flag}\b", source) for flag in flags_in(arguments)), (page, name)


def test_every_flag_on_a_page_exists() -> None:
    known = OTHER_PROGRAMS.union(*(options_of("", schema) for schema in SCHEMAS.values()))
    known |= {
        flag_name(f) for c in (COMMANDS | COMMANDS_OF_RUNS).values() for f in dataclasses.fields(c)
    }
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    for page in PAGES:
        if page in FAULTS:  # they name flags of other trainers
            continue
        for line in code_of(page):
            unknown = set() if line.startswith("#SBATCH") else flags_in(line) - known
            assert all(re.search(rf"\b{flag}\b", benchmarks) for flag in unknown), (page.name, line)


def test_every_log_key_is_explained() -> None:
    page = (ROOT / "docs" / "log.md").read_text()
    folders = [ROOT / "latentvae" / name for name in ("engine", "tasks")]
    source = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    kinds = "loss latent tokens discriminator objective optimizer data time validation grad".split()
    keys = set(re.findall(rf'"((?:{"|".join(kinds)})/[a-z_0-9]+)"', source))
    assert len(keys) > 15
    assert not {key for key in keys if f"`{key}`" not in page and key != "validation/samples"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_links_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    folders = r"latentvae|tests|train|benchmarks|docs|\.ci"
    for path in re.findall(rf"`((?:{folders})/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    if page.stem in ("architecture", "extending"):  # paths below the package
        for path in re.findall(r"`([\w/]+/(?:[\w.]+\.py)?)`", text):
            places = [ROOT, ROOT / "latentvae"]
            assert "<" in path or any((place / path).exists() for place in places), path


def test_the_commands_that_pack_shards_follow_links(tmp_path: Path) -> None:
    """`photos`, a class of it and one image are links elsewhere."""
    elsewhere = tmp_path / "disk" / "data"
    (elsewhere / "here").mkdir(parents=True)
    (tmp_path / "disk" / "dogs").mkdir()
    (elsewhere / "dogs").symlink_to(tmp_path / "disk" / "dogs")
    (tmp_path / "photos").symlink_to(elsewhere)
    (elsewhere / "here" / "a b.ppm").write_bytes(b"P6 1 1 255 abc")
    (tmp_path / "disk" / "dogs" / "rex.ppm").write_bytes(b"P6 1 1 255 xyz")
    (elsewhere / "linked.ppm").symlink_to(elsewhere / "here" / "a b.ppm")

    lines = code_of(ROOT / "docs" / "tar-shards.md")
    script = "\n".join(lines[: next(i for i, row in enumerate(lines) if "accelerate" in row)])
    script = script.replace("-l 5000", "-l 2")
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True)

    folder, shards = open_source(tmp_path / "photos"), open_source(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 2
    names = [[source.name(i) for i in range(len(source))] for source in (folder, shards)]
    assert names[0] == names[1] == ["dogs/rex.ppm", "here/a b.ppm", "linked.ppm"]
