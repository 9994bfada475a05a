"""Recipes as a user meets them: overrides are told, what would waste a night ends in one line, the launch script starts, tables keep theirs and ours apart."""
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path

os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import matplotlib.pyplot as plt
import pytest
import torch
from parity import load_case, released_state

from ris_nb.cli.main import main, parse
from ris_nb.cli.train import train_flags
from ris_nb.contract import RISError
from ris_nb.data.check import count_split
from ris_nb.data.prepare import count_differences
from ris_nb.data.refer import PUBLISHED
from ris_nb.data.sources import open_data
from ris_nb.data.tokenizer import SPECIAL, build_vocabulary
from ris_nb.data.writer import make_refshapes, make_reftoys
from ris_nb.encoders.language import TextEncoder
from ris_nb.evaluation.report import Record, make_report
from ris_nb.models import layers
from ris_nb.models.alignment import alignment_loss
from ris_nb.models.cris import CRIS
from ris_nb.models.lavt import LAVT
from ris_nb.models.magnet import MagNet
from ris_nb.models.rela import ReLA
from ris_nb.models.sag import SaG
from ris_nb.recipes.expectation import expectation
from ris_nb.recipes.published import benchmark_table, find_results, our_results, read_published, result_tables, results_figure, results_text
from ris_nb.recipes.recipe import check_pretrained, plan, read_recipe
from ris_nb.recipes.recipes import LAVT_CODE, RECIPES, find_recipe, list_recipes
from ris_nb.recipes.released import released_model
from ris_nb.recipes.run import LEARNERS, build_model
from ris_nb.registry import load_model
from ris_nb.settings import defaults, flat
from ris_nb.studies.sag import SAG_RECIPE
from ris_nb.training.config import TINY_RECIPE, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--steps", 2, "--batch-size", 4, "--accumulate", 1, "--warmup", 0, "--val", "none")


def ris(*words):
    """Exit code, standard output, and the lines of standard error that are no progress bars."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), [line for line in re.split(r"[\r\n]+", err.getvalue()) if line.strip() and "%|" not in line]


def refused(words, *needles):
    code, out, err = ris(*words)
    assert code == 2 and len(err) == 1 and "Traceback" not in err[0], (code, err)
    for needle in needles:
        assert str(needle) in err[0], err
    return out


@pytest.fixture(scope="module")
def root(shared):
    return shared("recipes", lambda folder: make_refshapes(folder / "data", counts={"train": 5, "val": 3})) / "data"


@pytest.fixture
def refcoco(root, tmp_path, monkeypatch):
    """RefShapes in the clothes of RefCOCO, counts "published" and all."""
    home = tmp_path / "refer"
    shutil.copytree(root / "refshapes", home / "refcoco")
    (home / "refcoco/refs(generated).p").rename(home / "refcoco/refs(unc).p")
    shutil.copytree(root / "images/refshapes", home / "images/mscoco/images/train2014")
    data = open_data(home, "refcoco")
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), {split: tuple(count_split(data, split).values()) for split in data.splits})
    assert count_differences([data]) == []
    return home


# The data

@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_default_of_every_flag(name, monkeypatch):
    world = 1 if name in ("lavt_photo", "own_photos") else 2  # its 7 photos can't be shared out
    monkeypatch.setenv("WORLD_SIZE", str(world))
    flags = parse(train_flags(["--recipe", name]), "train", ["--recipe", name])
    values, given = RECIPES[name].values(world), {**vars(flags), **asdict(flags.training)}
    assert {key: given[key] for key in values} == values
    assert asdict(flags.training) == asdict(RECIPES[name].config(world))
    flags = parse(train_flags(["--recipe", name]), "train", ["--recipe", name, "--lr", "1", "--dataset", "mine"])
    assert (flags.training.lr, flags.dataset, flags.model) == (1.0, "mine", values["model"])


def test_recipes_hold_the_papers_settings():
    def config(name): return RECIPES[name].config(8)
    assert (config("magnet_refcoco").steps, config("lavt_refcoco+").steps, config("sag_refcocog").steps) == (53_005, 52_847, 133_553)
    for name in ("lavt_refcoco", "magnet_refcocog"):
        c = config(name)
        assert (c.lr, c.weight_decay, c.batch_size, c.schedule, c.power, c.warmup, c.clip) == (5e-5, 1e-2, 32, "poly", 0.9, 0, None)
    c = config("sag_phrasecut")
    assert (c.lr, c.weight_decay, c.batch_size, c.schedule, c.warmup, c.warmup_kind, c.clip) == (1e-5, 1e-4, 32, "cosine", 5000, "loss", 0.1)
    assert [RECIPES[name].settings["split_by"].value for name in ("magnet_refcocog", "sag_refcocog", "sag_phrasecut")] == ["umd", "google", "authors"]
    assert config("lavt_tiny") == TrainConfig(**TINY_RECIPE) and config("sag_tiny") == TrainConfig(**SAG_RECIPE)


CLASSES = {"lavt": LAVT, "magnet": MagNet, "sag": SaG, "rela": ReLA, "cris": CRIS}
ELSEWHERE = {"self", "vocabulary", "image_size", "freeze", "lr_factors"}  # from the data, from flags, from the preset


@pytest.mark.parametrize("name", [name for name in RECIPES if not re.search("tiny|photo|toys", name)])  # those have no paper
def test_every_argument_of_the_network_has_a_value_and_a_source(name):
    network = RECIPES[name].network
    arguments = flat(defaults(CLASSES[name.partition("_")[0]]))
    assert set(arguments) - ELSEWHERE == set(network) - ELSEWHERE and all(setting.source for setting in network.values())
    if "alignment.weight" in network:
        temperatures = inspect.signature(alignment_loss).parameters["temperatures"].default
        assert "{}, {} and {}".format(*temperatures) in network["alignment.weight"].source


def test_sources_say_no_more_than_is_known():
    def source(recipe, name): return (RECIPES[recipe].settings | RECIPES[recipe].network)[name].source
    assert source("magnet_refcocog", "split_by").startswith("our choice")                  # ELIA's script is for the other division
    assert all("refcoco+ and refcocog (google)" in source("magnet_refcoco", name) for name in ("lr", "batch_size", "steps", "grounding.weight"))
    assert all(source("magnet_refcoco", name).startswith("not known of MagNet") for name in ("schedule", "power", "warmup", "clip", "best"))
    assert all("our choice" in source("sag_phrasecut", name) for name in ("steps", "lr", "warmup", "batch_size", "seed"))  # no script for it
    assert source("sag_refcoco", "lr") == "SaG's released code" and source("lavt_refcoco", "lr") == LAVT_CODE


def test_steps_follow_from_epochs_and_the_data():
    cases = {(): 52_782, (("split_by", "google"),): 56_027, (("batch_size", 64),): 26_391, (("each", "sentence"),): 100_640,
             (("dataset", "refcoco+"), ("split_by", "unc")): 52_847, (("dataset", "mine"), ("split_by", "x")): 52_782}
    for given, steps in cases.items():
        recipe = find_recipe("magnet_refcocog", **dict(given))
        assert recipe.config().steps == steps, given
        assert recipe.config().validate_every == pytest.approx(steps / 40, abs=1)
        assert plan(recipe).count("OVERRIDE") == len(given)
    assert "44,822 objects of refcocog (google) train in batches of 32" in plan(find_recipe("magnet_refcocog", split_by="google"))
    assert find_recipe("magnet_refcoco", batch_size=64).config(8).accumulate == 2          # what fits on a device stays
    for given, needle in (({"split_by": "unc"}, "umd or google, not by 'unc'"), ({"split": "testA"}, "without a split 'testA'; there are train, val, test")):
        with pytest.raises(RISError, match=needle) as caught: find_recipe("magnet_refcocog", **given)
        assert "\n" not in str(caught.value)
    assert find_recipe("lavt_tiny", split_by="generated", batch_size=8).config().steps == 1250  # not counted in epochs
    assert list(list_recipes()) == list(RECIPES) and "40 epochs, 53,005 steps of 32 pairs" in list_recipes()["magnet_refcoco"]


def test_recipes_are_read_without_what_computes():
    """`ris-nb recipes` and `train --help` must not wait for packages that they have no use for."""
    heavy = ["accelerate", "scipy", "transformers", "timm", "httpx"]
    program = (f"import sys; from huggingface_hub import PyTorchModelHubMixin, list_repo_files; theirs = set(sys.modules)  # version 1 reads httpx at once\n"
               f"import ris_nb.recipes.recipes, ris_nb.training.loop; print(*(name for name in {heavy} if name in sys.modules.keys() - theirs))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == []


def test_what_to_expect_says_its_assumptions_and_is_silent_where_nobody_measured(tmp_path):
    config = RECIPES["magnet_refcoco"].config(8)
    assert "not measured on this device (A)" in expectation("magnet_swin_base", config, device="A", folder=tmp_path / "absent")  # as in a wheel
    row = {"part": "training step", "variant": "as in fit", "batch": 4, "items_per_second": 20.0, "peak_gib": 21.5}
    (tmp_path / "a.json").write_text(json.dumps({"device": "A", "models": {"magnet_swin_base": {"machine": "A, 2 threads", "rows": [row]}}}))
    (tmp_path / "b.json").write_text("[1]"), (tmp_path / "c.json").write_text("{")
    assert expectation("magnet_swin_base", config, 1, "A", tmp_path) == (
        "time: about 24 hours of steps alone; 21.5 GiB; measured on one A, 2 threads: 20 pairs a second, 4 at once")
    assert "2.9 hours of steps alone on 8 devices, one for each process and their exchange not counted" in expectation("magnet_swin_base", config, 8, "A", tmp_path)


@pytest.mark.parametrize("notebook, model", [("13_magnet", "magnet_tiny"), ("17_sag", "sag_tiny"), ("19_cris", "cris_tiny"), ("20_rela", "rela_tiny")])
def test_tiny_recipes_are_the_commands_that_made_the_shipped_weights(notebook, model):
    line = re.search(rf"ris-nb train [^\n\"\\]*--model {model}[^\n\"\\]*", (ROOT / f"nbs/{notebook}.ipynb").read_text())[0]
    words = shlex.split(line)[2:]
    typed = parse(train_flags(words), "train", words)
    recipe = parse(train_flags(["--recipe", model]), "train", ["--recipe", model])
    assert asdict(typed.training) == asdict(recipe.training) and (typed.model, typed.pretrained) == (recipe.model, recipe.pretrained)


# A run

def test_a_tiny_recipe_runs_tells_its_values_and_resumes(root, tmp_path):
    words = ["train", "--recipe", "lavt_tiny", "--root", root, "--out", tmp_path, *QUICK]
    code, out, err = ris(*words)
    assert (code, err) == (0, []), err
    assert re.search(r"lr +0\.002 +our choice", out) and re.search(r"steps +2 +OVERRIDE: the recipe says 1250", out)
    assert re.search(r"val +none +OVERRIDE: the default says auto", out) and "time and memory" in out or "time: about" in out
    assert json.loads((tmp_path / "command.json").read_text())["recipe"] == "lavt_tiny" and load_model(tmp_path)
    refused([*words, "--resume", "--each", "sentence"], "--each was object and is now sentence")
    assert ris(*words, "--resume")[0] == 0


def test_sentences_and_frozen_parts(root, tmp_path):
    words = ["train", "--root", root, "--model", "lavt_tiny", *QUICK, "--freeze", "text", "--each", "sentence", "--out", tmp_path]
    assert ris(*words)[0] == 0
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["samples"] == sum(len(r.sentences) for r in open_data(root).referrals("train"))
    torch.manual_seed(0)
    flags = parse(train_flags(), "train", [str(word) for word in words[1:]])
    fresh = build_model(flags, open_data(root).referrals("train"))
    trained = load_model(tmp_path).state_dict()
    moved = {name.partition(".")[0] for name, value in fresh.state_dict().items() if not torch.equal(value, trained[name])}
    assert moved == {"encoder", "decoder"}
    refused([*words[:-4], "--out", tmp_path / "b", "--freeze", "txt"], "no part 'txt'", "text, encoder, decoder")


def test_stages_follow_each_other_and_go_on_where_they_were(tmp_path):
    make_reftoys(tmp_path / "data", "reftoys_described", {"train": 9})
    run, (pictures, words, gather) = tmp_path / "run", [tmp_path / f"run/before_{name}" for name in ("1_pictures", "2_words", "3_gather")]
    line = ["train", "--recipe", "sag_toys", "--root", tmp_path / "data", "--out", run, "--steps", 2, "--batch-size", 4]
    code, out, err = ris(*line)
    assert (code, err) == (0, []) and re.search(r"before: gather +freeze=vision entities steps=1400 lr=0.002", out) and re.search(r"steps +2 +OVERRIDE", out), err
    models = [load_model(folder) for folder in (pictures, words, gather, run)]
    moved = [{name.partition(".")[0] for name, value in b.state_dict().items() if not torch.equal(value, a.state_dict()[name])}
             for a, b in zip(models, models[1:])]
    assert moved == [{"text"}, {"text", "sentence", "fusion"}, {"text", "sentence", "fusion", "entities", "decoder"}]
    assert [model.frozen for model in models[2:]] == [("vision", "entities"), ("vision",)] and models[3].threshold == 0.2
    weights = (run / "model.safetensors").read_bytes()
    shutil.rmtree(gather)
    for name in ("state.pt", "model.safetensors", "config.json", "log.jsonl", "train.json"):
        (run / name).unlink()  # killed in the third stage
    refused(line, "before_1_pictures: a stage of a run was trained here; resume it or choose another folder")
    assert ris(*line, "--resume")[0] == 0 and (run / "model.safetensors").read_bytes() == weights
    refused([*line, "--resume", "--lr", "0.1"], "lr was 0.0015 and is now 0.1")  # what is given holds in every stage
    assert ris(*line, "--force", "--lr", "0.001")[0] == 0 and all(json.loads((f / "train.json").read_text())["lr"] == 1e-3 for f in (pictures, gather, run))


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.stages])
def test_a_stage_sets_only_what_the_recipe_sets(name):
    for stage in RECIPES[name].stages:
        assert set(stage.settings) <= set(RECIPES[name].settings) and stage.learner in LEARNERS


# A recipe from a file

def write_recipe(path, text):
    path.write_text(text)
    return path


RECIPE_FAULTS = {
    "[settings]\nmodle = 'lavt_tiny'": "has no 'modle'; its settings are dataset",
    "[settings]\naccumulate = 2": "has no 'accumulate'",
    "epoch = 3\n[settings]": "has no 'epoch'",
    "[settings]\nlr = 'high'": "lr is 'high' and should be a number",
    "[settings]\npretrained = 1": "pretrained is 1 and should be true or false",
    "[settings]\nfreeze = 'text'": "freeze is 'text' and should be a list",
    "[settings]\neach = 'photo'": "each is 'photo' and should be one of object, sentence, image",
    "[settings]\nmodel = 'lavt_tiny'\nsteps = 3": "has no batch_size",
    "[settings]\nmodel = 'lavt_tiny'\nsteps = 3\nbatch_size = 0": "batch_size must be at least 1, not 0",
    "device_batch = 0\n[settings]": "device_batch must be at least 1, not 0",
    "[settings]\nmodel = 'lavt_tiny'\nsteps = 3\nbatch_size = 8\nwarmup = 9": "warmup must be at least 0 and less than steps (3)",
    "epochs = 3\n[settings]\nmodel = 'lavt_tiny'\nbatch_size = 8\ndataset = 'mine'": "epochs are counted on published data sets (refcoco",
    "epochs = 3\n[settings]\nmodel = 'lavt_tiny'\nbatch_size = 8\ndataset = 'refcoco'": "divided by unc, not by None",
    "settings = 3": "needs a table `settings`",
    "[settings": "can't be read as a recipe",
}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML from version 3.11 on")
@pytest.mark.parametrize("text", RECIPE_FAULTS)
def test_a_faulty_recipe_ends_in_one_line(text, tmp_path):
    with pytest.raises(RISError) as caught: read_recipe(write_recipe(tmp_path / "mine.toml", text))
    assert RECIPE_FAULTS[text] in str(caught.value) and "mine.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_has_its_own_numbers_and_faults(tmp_path):
    path = write_recipe(tmp_path / "mine.yaml", "settings: {model: lavt_tiny, batch_size: 8, steps: 3, lr: 1e-3}")
    with pytest.raises(RISError, match="lr is '1e-3' and should be a number; in YAML a number such as 1e-3 is written 1.0e-3"): find_recipe(path)
    for text, needle in {"[a, b]": "needs a table", "a: b: c": "can't be read as a recipe", "settings: {a: 1": "can't be read as a recipe"}.items():
        with pytest.raises(RISError, match=needle): find_recipe(write_recipe(path, text))
    with pytest.raises(RISError, match="absent.yml: can't be read as a recipe"): find_recipe(tmp_path / "absent.yml")


def test_the_command_trains_by_a_recipe_of_ones_own(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """
about: mine
device_batch: 4
settings: {model: lavt_tiny, batch_size: 8, steps: 2, val: none, each: sentence, lr: {value: 1.0e-3, source: a guess}}
network: {dice: 0.0}"""
    write_recipe(tmp_path / "mine.yaml", text)
    words = ["train", "--recipe", "mine.yaml", "--root", root]
    code, out, err = ris(*words)
    assert (code, err) == (0, []), err
    assert re.search(r"lr +0.001 +a guess", out) and re.search(r"dice +0 +mine.yaml", out) and re.search(r"accumulate +2 +at most 4 pairs", out)
    assert load_model(tmp_path / "runs/mine").dice == 0 and json.loads((tmp_path / "runs/mine/train.json").read_text())["lr"] == 1e-3
    assert ris(*words, "--resume")[0] == 0
    refused([*words, "--resume", "--lr", "0.5"], "lr was 0.001 and is now 0.5")
    refused(["train", "--recipe", "their.yaml", "--root", root], "their.yaml: can't be read as a recipe")


# What would waste a night

def test_faults_end_in_one_line(root, refcoco, tmp_path, monkeypatch):
    magnet = ["train", "--recipe", "magnet_refcoco", "--out", tmp_path / "run"]
    refused(["train", "--recipe", "magnet_refcoo"], "no recipe is called 'magnet_refcoo'", "magnet_refcoco")
    refused([*magnet, "--root", root], "ris-nb data prepare refcoco")                     # RefShapes lies there
    said = refused([*magnet, "--root", refcoco], "the pretrained weights of 'swin_base", "Hugging Face Hub")   # the Hub is out of reach
    assert "53005" in said and re.search("^time", said, re.M)                             # told before anything is loaded
    (photo := next((refcoco / "images/mscoco/images/train2014").iterdir())).rename(tmp_path / "gone")
    refused([*magnet, "--root", refcoco], "photos are missing", photo.parent, "ris-nb data prepare refcoco")
    (tmp_path / "gone").rename(photo)
    counts = PUBLISHED["refcoco", "unc"]
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), counts | {"val": (9, 9, 9)})
    refused([*magnet, "--root", refcoco], "val has", "instead of 9", "ris-nb data prepare refcoco")
    monkeypatch.setitem(PUBLISHED, ("refcoco", "unc"), counts)
    monkeypatch.setenv("WORLD_SIZE", "6")
    refused([*magnet, "--root", refcoco], "32 pairs can't be shared out evenly over 6 processes")
    assert not (tmp_path / "run").exists()


def test_a_silent_random_backbone_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "start_pretrained", lambda *args: None)                     # a loader that forgets, and says nothing
    refused(["train", "--recipe", "lavt_tiny", "--root", root, "--out", tmp_path / "run", *QUICK], "did not reach LAVT's encoder.vision")
    assert not (tmp_path / "run").exists()


def test_half_loaded_encoders_are_refused():
    model = torch.nn.ModuleDict({"text": TextEncoder(20, 16, 2, 2, 16, 8)})
    with pytest.raises(RISError, match="did not reach ModuleDict's text"): check_pretrained(model, ["text"])
    for part in model.modules():
        if isinstance(part, torch.nn.LayerNorm): torch.nn.init.normal_(part.weight, 1, 0.1)
    check_pretrained(model, ["text"])
    torch.nn.init.ones_(model["text"].bert.encoder.layer[1].output.LayerNorm.weight)      # one layer's entries had other names
    with pytest.raises(RISError, match=r"1 of its layers are untouched, the first is bert.encoder.layer.1.output.LayerNorm"):
        check_pretrained(model, ["text"])


# Many processes

def launch_script():
    """The file for sbatch, as chapter 24 prints it."""
    cells = json.loads((ROOT / "nbs/24_full_scale.ipynb").read_text())["cells"]
    text = next("".join(cell["source"]) for cell in cells if "#SBATCH" in "".join(cell["source"]) and cell["cell_type"] == "markdown")
    return re.search(r"```bash\n(.*?)```", text, re.S)[1]


DIRECTIVES = {  # of sbatch: the options that a job may name here, and what their values look like
    "job-name": r"\S+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": r"\d+", "gpus-per-node": r"([a-z]\w*:)?\d+", "gres": r"gpu(:\w+)?:\d+",
    "cpus-per-task": r"\d+", "mem": r"\d+[KMGT]?", "time": r"(\d+-)?\d+(:[0-5]\d){0,2}", "requeue": None, "partition": r"[\w,]+", "account": r"\w+",
    "output": r"\S+", "error": r"\S+", "exclusive": None, "signal": r"\S+"}


def sbatch_problems(text):
    """What `sbatch --test-only` would refuse, or read over in silence, in a job's file."""
    first, *lines = text.splitlines()
    problems = [] if re.fullmatch(r"#!/\S+(/env)?( \S+)*", first) else ["This does not look like a batch script: the first line must start with #! and the path of an interpreter"]
    if re.search(r"<[^<>\s]+>|\{\{|TODO|\$\{?[A-Z_]+", "\n".join(line for line in lines if line.startswith("#SBATCH"))):
        problems.append("a directive has a placeholder, and sbatch expands none")
    started, seen = False, set()
    for line in lines:
        if line.startswith("#SBATCH"):
            option = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line.rstrip())
            if started: problems.append(f"{line}: comes after the first command and is ignored")
            if option is None or option[1] not in DIRECTIVES: problems.append(f"{line}: unrecognized option")
            elif option[1] in seen: problems.append(f"{line}: given twice")
            elif (option[2] is None) != (DIRECTIVES[option[1]] is None): problems.append(f"{line}: a value is missing, or one too many")
            elif option[2] is not None and not re.fullmatch(DIRECTIVES[option[1]], option[2]): problems.append(f"{line}: invalid specification")
            seen.add(option and option[1])
        elif re.match(r"#\s*SBATCH|\s+#SBATCH", line): problems.append(f"{line}: is a comment, not a directive")
        elif line.strip() and not line.startswith("#"): started = True
    if "\r" in text: problems.append("Batch script contains DOS line breaks")
    if {"nodes", "time", "ntasks-per-node"} - seen: problems.append("the job doesn't say how many nodes, tasks and how long")
    return problems


BROKEN = {"no hash": ("#!/bin/bash", "!/bin/bash"), "no interpreter": ("#!/bin/bash\n", ""), "a wrong option": ("--gpus-per-node", "--gpu-per-node"),
          "a wrong time": ("24:00:00", "24h"), "a minute too many": ("24:00:00", "24:60:00"), "after a command": ("#SBATCH --requeue\nset -euo pipefail", "set -euo pipefail\n#SBATCH --requeue"),
          "a blank": ("#SBATCH --nodes=2", "# SBATCH --nodes=2"), "no value": ("--nodes=2", "--nodes="), "a variable": ("--job-name=magnet", "--job-name=$NAME"),
          "a placeholder": ("--job-name=magnet", "--job-name=<name>"), "twice": ("#SBATCH --requeue", "#SBATCH --requeue\n#SBATCH --requeue"),
          "a value too many": ("--requeue", "--requeue=yes"), "memory": ("#SBATCH --requeue", "#SBATCH --mem=64GB"), "DOS": ("pipefail\n", "pipefail\r\n")}


def test_sbatch_would_take_the_script():
    assert sbatch_problems(launch_script()) == []


@pytest.mark.parametrize("old, new", BROKEN.values(), ids=BROKEN)
def test_sbatch_would_refuse_a_broken_script(old, new):
    script = launch_script()
    assert script.count(old) >= 1
    assert len(sbatch_problems(script.replace(old, new, 1))) >= 1


STUBS = {"scontrol": 'echo 127.0.0.1\n', "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n', "srun": """
[ "$1" = --kill-on-bad-exit=1 ] && shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_script_for_a_cluster_trains_on_two_machines(root, tmp_path):
    """`srun` and `scontrol` are stand-ins; the rendezvous, the processes and the training are real."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + body)
        (tmp_path / name).chmod(0o755)
    script = launch_script()
    command = "--recipe magnet_refcoco --root data --out runs/magnet"
    assert command in script
    flags = f"--recipe lavt_tiny --root {root} --out {tmp_path / 'run'} {' '.join(map(str, QUICK))}"
    (tmp_path / "job.sh").write_text(script.replace(command, flags))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "PORT": str(port), "OMP_NUM_THREADS": "1",
                "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", tmp_path / "job.sh"], env={**os.environ, **settings}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("recipe: lavt_tiny") == 1 and done.stdout.count("2 steps") == 1      # one process speaks
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2] and load_model(tmp_path / "run")


# The authors' weights

@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small MagNet under the names of the authors' code, as a file."""
    path = tmp_path_factory.mktemp("released") / "magnet.pth"
    torch.save({"model": released_state(load_case("magnet_tiny")), "epoch": 3}, path)
    return path


def test_released_weights_are_scored_by_the_papers_protocol(root, released, tmp_path, monkeypatch):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(build_vocabulary(s.text for r in open_data(root).referrals("val") for s in r.sentences)))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, tmp_path / "data")
    init = MagNet.__init__
    monkeypatch.setattr(MagNet, "__init__", lambda self, image_size=64, **sizes: init(self, image_size, **sizes))  # 480 pixels would take long
    words = ["evaluate", "--released", released, "--data", "refshapes", "--split", "val", "--vocabulary", vocabulary]
    code, out, err = ris(*words)
    assert (code, err) == (0, []), err
    report = json.loads((tmp_path / "runs/released/magnet/val/report.json").read_text())
    assert report["resolution"] == "model" and report["checkpoint"] == f"released {released}"
    assert report["expressions"] == sum(len(r.sentences) for r in open_data(root).referrals("val"))


def test_released_weights_that_cannot_be_had(root, released, tmp_path):
    data = ["evaluate", "--root", root]
    refused([*data, "--released", "magnet_refcoco"], "yxchng/magnet_weights", "out of reach", "go online")
    refused([*data, "--released", tmp_path / "none.pth"], "none.pth: no such checkpoint")
    refused([*data, "--released", "nobody/nothing/x.pth"], "nobody/nothing/x.pth", "go online")
    refused([*data, "--released", released, "--vocabulary", "nowhere"], "vocabulary nowhere", "give the path of a vocab.txt")
    refused(data, "either --checkpoint", "--released")
    refused([*data, "--released", "x", "--checkpoint", "y"], "either --checkpoint")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    refused([*data, "--released", tmp_path / "other.pth"], "is no checkpoint of LAVT, MagNet, SaG, CRIS or ReLA")


@pytest.mark.parametrize("case, kind", [("lavt_tiny", "LAVT"), ("sag_tiny", "SaG"), ("cris_tiny", "CRIS"), ("rela_tiny", "ReLA")])  # MagNet: above
def test_the_entries_tell_whose_weights_they_are(case, kind, tmp_path):
    torch.save(released_state(load_case(case)), tmp_path / "weights.pth")
    assert type(released_model(str(tmp_path / "weights.pth"), vocabulary=SPECIAL)).__name__ == kind


# Theirs and ours

def report(tmp_path, data="refcoco (unc)", split="val", name="run", **more):
    path = tmp_path / name / split / "report.json"
    made = make_report([Record(i, 0, i, "it", "", 60 + i % 3, 100, 0.1) for i in range(20)], "model", data=data, split=split, checkpoint=name, **more)
    return made.save(path)


@pytest.mark.parametrize("row", read_published()["benchmarks"], ids=lambda row: f"{row['method']} {row['dataset']} {row['split_by']} {row['metric']}")
def test_a_published_figure_says_what_it_is(row):
    assert set(row) == {"method", "learns from", "trained on", "dataset", "split_by", "metric", "scores", "source"} and all(row.values())
    assert row["metric"] in (("cIoU", "gIoU", "N-acc", "T-acc") if row["dataset"] == "grefcoco" else ("oIoU", "mIoU", "IoU (kind not named)"))
    assert all(0 < score < 100 and round(score, 2) == score for score in row["scores"].values())
    assert set(row["scores"]) <= {*PUBLISHED.get((row["dataset"], row["split_by"]), ("val", "testA", "testB", "test")), "split not named"}
    assert row["learns from"] in ("masks", "boxes", "sentences", "sentences, with a detector and SAM")
    assert (row["learns from"] == "sentences") == (row["source"].startswith("SaG, ICCV") or row["method"] == "PCNet")
    assert ("second hand" in row["source"]) == (row["method"] == "PCNet" or (row["method"], row["metric"]) == ("MagNet", "mIoU"))
    assert row["split_by"] in ("unc", "umd", "google", "authors", "final", "split not named")


def test_no_figure_stands_under_two_metrics():
    """MagNet's README prints CRIS's means over expressions among overall IoUs."""
    rows = read_published()["benchmarks"]
    found = {}
    for row in rows:
        found.setdefault((row["method"], row["dataset"], row["split_by"]), {})[row["metric"]] = row["scores"]
    assert sum(map(len, found.values())) == len(rows)
    for metrics in found.values():
        values = [score for scores in metrics.values() for score in scores.values()]
        assert len(set(values)) == len(values) or len(metrics) == 1
    assert all(set(metrics) == {"mIoU"} for (method, *_), metrics in found.items() if method.startswith("CRIS"))
    assert sum(len(metrics["mIoU"]) for (method, *_), metrics in found.items() if method == "LAVT") == 9
    for key in found:  # where both are printed, the mean is the larger one in these data
        if {"oIoU", "mIoU"} <= set(found[key]) and key[1] != "ref-zom":  # Ref-ZOM has expressions without a referent
            assert all(found[key]["mIoU"][split] > found[key]["oIoU"][split] for split in found[key]["oIoU"] if split in found[key]["mIoU"]), key


def test_metrics_share_neither_column_nor_axis():
    published = read_published()
    with pytest.raises(RISError, match="one data set and one metric"):
        benchmark_table(published["benchmarks"], [])
    tables = [table for table in result_tables(published) if table.head[-1] == "source"]
    for table in tables:
        data, metric, training = re.fullmatch(r"Published: (.+? \(.+?\)), (.+) in percent; (learned from .+)", table.title).groups()
        rows = [row for row in published["benchmarks"] if f"{row['dataset']} ({row['split_by']})" == data and row["metric"] == metric
                and row["method"] in {line[0] for line in table.rows}]
        assert len(rows) == len(table.rows) and len({row["learns from"] for row in rows}) == 1
        assert len({row["trained on"] for row in rows}) == 1 or "other data" in training and "trained on" in table.head
        for row, line in zip(rows, table.rows):
            cells = dict(zip(table.head, line))
            assert row["method"] == line[0] and row["source"] == line[-1]
            assert {name: cells[name] for name in cells if name not in ("", "trained on", "source") and cells[name]} == {k: f"{v:.2f}" for k, v in row["scores"].items()}
    assert sum(len(table.rows) for table in tables) == len(published["benchmarks"])
    figure = results_figure(published, [], {})
    for ax, metric in zip(figure.axes, ("oIoU", "mIoU"), strict=True):
        drawn = {round(float(x), 2) for line in ax.lines for x in line.get_xdata()}
        assert ax.get_xlabel() == f"{metric}, %" and drawn == {row["scores"]["val"] for row in published["benchmarks"]
                                                               if row["metric"] == metric and row["method"] in ("LAVT", "MagNet", "SaG") and "val" in row["scores"]}
    plt.close(figure)


def test_published_numbers_are_those_of_the_sources():
    rows = {(row["method"], row["dataset"], row["split_by"], row["metric"]): row["scores"] for row in read_published()["benchmarks"]}
    assert rows["CRIS", "refcoco+", "unc", "mIoU"] == {"val": 62.27, "testA": 68.08, "testB": 53.68}
    assert rows["LAVT", "refcocog", "umd", "mIoU"] == {"val": 63.34, "test": 63.62}
    assert rows["ReLA", "grefcoco", "unc", "gIoU"] == {"val": 63.60}
    assert rows["MagNet", "refcoco", "unc", "oIoU"] == {"val": 75.24, "testA": 78.24, "testB": 71.05}
    assert rows["LAVT", "refcoco", "unc", "oIoU"]["val"] == 72.73 and rows["SaG", "phrasecut", "authors", "mIoU"] == {"val": 33.45}
    assert rows["SaG", "refcocog", "google", "mIoU"] == {"val": 28.87}


def test_results_of_one_kind_of_study_in_all_places():
    """A study whose figures name no data set ("mIoU") has a table and a panel, too; one without scores has neither."""
    rows = [{"variant": name, "seed": seed, "mIoU": 0.5 + seed / 100, "found": 0.9} for name in "ab" for seed in range(3)]
    none = [{"variant": "a", "seed": 0, "found": 0.9}]
    published = {**read_published(), "benchmarks": [], "studies": []}
    assert "51.0 ± 2.5" in results_text(published, [], {"parts": rows, "none": none}) and "none" not in results_text(published, [], {"none": none})[3:]
    figure = results_figure(published, [], {"parts": rows, "none": none})
    assert [ax.get_xlabel() for ax in figure.axes] == ["oIoU, %", "mIoU, %", "mIoU, %"]
    plt.close(figure)
    assert find_results(published, [], {"parts": rows}, dataset=None, method="a")[2] == {"parts": rows[:3]}


def test_theirs_and_ours_never_share_a_column(tmp_path):
    report(tmp_path), report(tmp_path, split="testA"), report(tmp_path, name="shuffled", shuffled=0), report(tmp_path, data="refshapes (generated)", name="toy")
    reports, studies = our_results([tmp_path, tmp_path / "absent"])
    assert len(reports) == 3 and studies == {}
    rows = [row for row in read_published()["benchmarks"] if (row["dataset"], row["metric"]) == ("refcoco", "oIoU")]
    head, _, *lines = benchmark_table(rows, [r for r in reports.values() if r.data == "refcoco (unc)"]).splitlines()
    columns = list(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in [head, *lines])))
    for name, *cells in columns[3:-1]:
        filled = [bool(cell) for cell in cells]
        assert any(filled) or name == "testB, ours"
        assert not any(filled[len(rows):] if name.endswith("published") else filled[:len(rows)]), name
    code, out, err = ris("results", tmp_path)
    assert (code, err) == (0, []) and out.count("60.95 (60.") == 6 and "Measured here: refshapes (generated)" in out and "Measured here: refcoco (unc)" in out
    code, out, err = ris("results", tmp_path, "--markdown", tmp_path / "r.md", "--figure", tmp_path / "r.png")
    assert (code, out, err) == (0, "", []) and "75.24" in (tmp_path / "r.md").read_text() and (tmp_path / "r.png").read_bytes()[1:4] == b"PNG"
    assert "75.24" not in (out := ris("results", tmp_path, "--dataset", "refcoco", "--metric", "mIoU")[1]) and "77.43" in out and "Measured here: refshapes" not in out and out.count("60.95 (60.") == 2
    out = ris("results", tmp_path, "--learns-from", "boxes")[1]
    assert "60.95" not in out and "66.54" in out
    found = json.loads(ris("results", tmp_path, "--method", "toy", "--json")[1])
    assert found["published"]["benchmarks"] == [] and [report["checkpoint"] for report in found["measured"]] == ["toy"]
    refused(["results", "--dataset", "refcococ"], "refcococ", "refcoco+")
    refused(["results", "--metric", "IoU"], "'IoU'", "oIoU")
    (tmp_path / "other.json").write_text("{}")
    assert ris("results", tmp_path)[0] == 0                                              # not a result, and nobody named it
    refused(["results", tmp_path / "other.json"], "other.json", "not a report")
    (tmp_path / "other.json").write_text("{")
    refused(["results", tmp_path / "other.json"], "other.json")
