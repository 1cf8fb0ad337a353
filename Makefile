PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint clean

# A virtual environment of the project's own, made again when the requirements change.
.venv/ready: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

# The main job on an embedded data set: make it, train on it, evaluate, detect on unseen images.
# Every demo has a folder of its own.
demo: DEMO := demo/$(shell date +%Y-%m-%d_%H-%M-%S)
demo: .venv/ready
	$(BIN)/python -m keras_fpn.data.demo_dataset --data-dir $(DEMO)/data --unseen-images $(DEMO)/unseen
	$(BIN)/python training/train.py --recipe demo --dataset keras_fpn_shapes \
		--data-dir $(DEMO)/data --output $(DEMO)/run --verbose 2
	$(BIN)/python training/evaluate.py --model $(DEMO)/run --batch-size 8
	$(BIN)/python training/predict.py $(DEMO)/unseen/*.png --model $(DEMO)/run --output $(DEMO)/found
	@echo "Look at the pictures in $(DEMO)/found."

test: .venv/ready lint
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv
