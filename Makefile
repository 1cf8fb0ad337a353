PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint clean

# A virtual environment of the project's own, made again when the requirements change.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

# The main job on an embedded data set: make it, train on it, evaluate, detect on unseen images.
demo: .venv/ready
	rm -rf demo
	$(BIN)/python training/demo_dataset.py --data-dir demo/data --unseen-images demo/unseen
	$(BIN)/python training/train.py --recipe demo --dataset keras_fpn_shapes --data-dir demo/data \
		--output demo/run --verbose 2
	$(BIN)/python training/evaluate.py --model demo/run --batch-size 8
	$(BIN)/python training/predict.py demo/unseen/*.png --model demo/run --output demo/found
	@echo "Look at the pictures in demo/found."

test: .venv/ready lint
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv demo
