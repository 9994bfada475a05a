# Two commands cover most needs: `make demo` (train, evaluate and look at a model) and `make test` (what the project promises, each promise once).
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test test-slow chromium bench lab site export clean

# One environment serves all targets; a stamp file per extra remembers what has been installed for the present settings.ini.
.venv/installed: settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

# The first answers are about a photograph that no model was trained on, and come from the model that ships, in seconds.
demo: .venv/installed
	$(BIN)/ris-nb predict data/refphotos/photos/000000196393.jpg "green parakeet" "white cat with the purple collar" "a black cat" --out $(DEMO)/photo
	$(BIN)/ris-nb data shapes $(DEMO)/data
	$(BIN)/ris-nb data pack $(DEMO)/data --image-size 64 --out $(DEMO)/data.pack
	$(BIN)/ris-nb train --root $(DEMO)/data --pack $(DEMO)/data.pack --model lavt_tiny --pretrained --out $(DEMO)/lavt_tiny --force
	$(BIN)/ris-nb evaluate --checkpoint $(DEMO)/lavt_tiny --root $(DEMO)/data --split val --out $(DEMO)/val
	$(BIN)/ris-nb evaluate --checkpoint $(DEMO)/lavt_tiny --root $(DEMO)/data --split testC --out $(DEMO)/testC
	$(BIN)/ris-nb evaluate --checkpoint $(DEMO)/lavt_tiny --root $(DEMO)/data --split val --shuffle-seed 0 --out $(DEMO)/val_shuffled
	$(BIN)/ris-nb compare $(DEMO)/data/images/refshapes/val_000000.png "the red triangle" --models $(DEMO)/lavt_tiny lavt_tiny magnet_tiny sag_tiny --out $(DEMO)

# One thread a process: two processes side by side are faster on two cores than one process with two threads.
# What each test costs is in build/test_seconds.json afterwards.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal -q --durations=15

# Every promise once: all chapters by the rules of nbdev, equality with the authors' code, kills and bad lines, two processes, the wheel.
test: .venv/installed-dev
	$(PYTEST) -m "not slow"

# What that leaves out: the site, browsers, every chapter as Colab opens it, nbgrader, exams, studies, benchmarks, full sizes, the sweep of kills.
test-slow: .venv/installed-dev
	$(PYTEST) -m slow

# Chapter 25 is tested in a browser as well, where there is one: Debian's package, which root alone can install.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { test "$$(id -u)" = 0 && timeout 120 apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| { echo "Chromium can't be installed here: ask for the package chromium; the tests in a browser are skipped without it"; exit 1; }

# Speed and memory of every model on this machine, the paper's sizes too: up to an hour and 16 GB on a laptop.
# On a GPU, ten minutes are enough for the first script alone: python tests/bench/bench.py --minutes 10.
bench: .venv/installed
	$(BIN)/python tests/bench/bench.py $(BENCH)
	for part in magnet sag data scale summary; do $(BIN)/python tests/bench/bench_$$part.py || exit 1; done

lab: .venv/installed-lab
	$(BIN)/jupyter lab nbs

# All of it as web pages, built offline from the stored outputs: open _site/index.html, or put the folder on a web server.
site: .venv/installed-site
	$(BIN)/python nbs/site/pages.py build/site
	$(BIN)/python -m sphinx -q -E -W --keep-going -d build/doctrees -c nbs/site build/site _site

# After editing a notebook: write the library from it and remove what does not belong in a commit.
export: .venv/installed-dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

clean:
	rm -rf .venv runs build dist _site *.egg-info
