PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint clean

# The project's own virtual environment, recreated when the requirements change.
.venv/ready: requirements.txt setup.cfg
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

# End to end on a generated data set: train, evaluate, and detect objects in unseen images.
# Every demo has its own folder.
demo: DEMO := demo/$(shell date +%Y-%m-%d_%H-%M-%S)
demo: .venv/ready
	$(BIN)/python -m keras_fpn.data.demo_dataset --data-dir $(DEMO)/data --unseen-images $(DEMO)/unseen
	$(BIN)/keras-fpn train --recipe demo --dataset keras_fpn_shapes \
		--data-dir $(DEMO)/data --output $(DEMO)/run --verbose 2
	$(BIN)/keras-fpn evaluate --model $(DEMO)/run --batch-size 8
	$(BIN)/keras-fpn predict $(DEMO)/unseen/*.png --model $(DEMO)/run --output $(DEMO)/found
	@echo "Pictures of the detections are in $(DEMO)/found."

test: .venv/ready lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv
