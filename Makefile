# Every target sets up what it needs: a virtual environment in .venv with the packages of
# requirements.txt, Detectron2 and this package. The second time there is nothing left to do.

PYTHON ?= python3
ARGS ?=
RUN = .venv/bin/python

.PHONY: help demo nuclei demo-full study test test-long lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.11] [ARGS='...' for demo, nuclei and study]"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

# Where the data sets are. The shell does not expand a ~ that comes out of a variable.
DATA = $(patsubst ~/%,$(HOME)/%,$(or $(DETECTRON2_DATASETS),datasets))
SHAPES = projects/Shapes/checkpoints
SCENES = --size 512 --classes 5 --difficulty 0.1 --hue-spread 50 --min-radius 1.5 --max-radius 7.5 \
    --min-shapes 12 --max-shapes 40
ROIS = {name: roi_class, weight: 1.0}, {name: roi_box, weight: 1.0}, {name: roi_mask, weight: 1.0}
demo: .venv/.ready ## distil a detector of drawn shapes and compare, in minutes on a CPU
	$(RUN) projects/Shapes/generate.py --output "$(DATA)/shapes_512" \
	    --train 40 --val 200 $(SCENES)
	$(RUN) projects/Shapes/generate.py --output "$(DATA)/shapes_512_unlabeled" \
	    --train 360 --val 1 --seed 2 $(SCENES)
	$(RUN) tools/distill.py --config-file configs/Shapes/demo.yaml --weights $(SHAPES)/hr_512.pth \
	    --teacher $(SHAPES)/teacher_512.pth --baseline $(SHAPES)/lr_512.pth --detections 30 \
	    --unlabeled shapes_512_unlabeled --output output/shapes/demo $(ARGS) student:KD.LOSSES "[$(ROIS)]"

NUCLEI = projects/Nuclei/checkpoints
ZIP = stage1_train.zip
nuclei: .venv/.ready ## the same on real images, labels for 10 % of them, from ZIP=FILE
	@[ -d "$(DATA)/nuclei" ] || $(RUN) projects/Nuclei/prepare.py "$(ZIP)"
	$(RUN) tools/distill.py --config-file configs/Nuclei/demo.yaml --weights $(NUCLEI)/hr_10.pth \
	    --teacher $(NUCLEI)/teacher_10.pth --baseline $(NUCLEI)/lr_10.pth --detections 100 \
	    --unlabeled nuclei_train --output output/nuclei/demo $(ARGS) student:KD.LOSSES "[$(ROIS)]" \
	    student:SOLVER.WARMUP_ITERS 100 control:SOLVER.WARMUP_ITERS 100

demo-full: .venv/.ready ## every model of the demo trained, with three seeds of the students, in hours
	$(RUN) projects/study/run.py --grid projects/Shapes/demo_full.yaml $(ARGS)

study: .venv/.ready ## every method against every control on several seeds, in hours; resumable
	$(RUN) projects/study/run.py --grid projects/Shapes/study.yaml $(ARGS)

# A process a core, up to four, each with the tests of whole files, as these share what they train.
# More than one thread only gets in the others' way in models as small as those of the tests.
TEST = OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: .venv/.ready ## run the tests, in minutes
	$(TEST) -m "not long" tests

test-long: .venv/.ready ## run those that take minutes each
	$(TEST) -m long tests

lint: .venv/.ready ## check the style of the code
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

MADE = datasets/shapes
MADE += $(addprefix datasets/shapes_,fresh unlabeled 512 512_unlabeled 512_fresh)
clean: ## remove .venv, caches, output and the data sets generated in datasets
	@echo "Removing .venv, caches, output, $(MADE)"
	@rm -rf .venv .pytest_cache .ruff_cache build *.egg-info output $(MADE)
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: requirements.txt tools/install_detectron2.py
	@suits='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'; \
	if ! .venv/bin/python -c "$$suits" 2>/dev/null; then \
	    for python in $(PYTHON) python3.12 python3.11 python3.10 none; do \
	        if $$python -c "$$suits" 2>/dev/null; then break; fi; \
	    done; \
	    if [ $$python = none ]; then \
	        echo "Python 3.10, 3.11 or 3.12 is needed: make PYTHON=/path/to/it ..." >&2; exit 1; \
	    fi; \
	    echo "Creating .venv with $$($$python --version)"; \
	    $$python -m venv --clear .venv || { rm -rf .venv; exit 1; }; \
	fi
	@echo "Installing the packages of requirements.txt (some minutes and 5 GB the first time)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check pip==25.3
	@# pip would compile every file, which takes a minute; Python compiles those that it imports.
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@echo "Installing Detectron2"
	@$(RUN) tools/install_detectron2.py
	@echo "Installing msad_kd in place"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
