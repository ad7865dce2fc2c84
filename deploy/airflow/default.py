"""The pipeline on Airflow 3, a papermill task for each step, and on a schedule a training if a trigger has a reason.

Written by `celestial deploy airflow default`; after a change write it anew. Airflow has an environment of its own, with
apache-airflow-providers-papermill. The notebooks run in the project's, which is a kernel of Jupyter; to be registered once:
  .venv/bin/python -m ipykernel install --user --name celestial
CELESTIAL_KERNEL names another kernel, CELESTIAL_PROJECT the project's folder where this file isn't in it.
"""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from airflow.providers.papermill.operators.papermill import PapermillOperator
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG
from jupyter_client.kernelspec import get_kernel_spec

PROJECT = Path(os.environ.get("CELESTIAL_PROJECT") or Path(__file__).resolve().parents[2])
KERNEL = os.environ.get("CELESTIAL_KERNEL", "celestial")
PATH = f"{Path(get_kernel_spec(KERNEL).argv[0]).parent}:{os.environ['PATH']}"  # the project's environment first
# One run at a time, and one task: the steps share the run's folder. A step that is done again writes the same files.
ONE = {"start_date": datetime(2026, 1, 1, tzinfo=UTC), "catchup": False, "max_active_runs": 1, "max_active_tasks": 1}
PAGE = 'jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage'
STEPS = [{'name': 'acquire',
  'notebook': 'nbs/steps/01_acquire.ipynb',
  'output': 'output/default/acquire.ipynb',
  'upstream': [],
  'parameters': {'run': 'default',
                 'seed': 7,
                 'source': 'render',
                 'sources': [],
                 'folder': None,
                 'labels': None,
                 'test_folder': None,
                 'per_class': 150,
                 'image_px': 128,
                 'maps': None,
                 'split': 'auto',
                 'groups': [],
                 'split_file': None,
                 'val': 0.15,
                 'test': 0.2,
                 'test_source': None}},
 {'name': 'check',
  'notebook': 'nbs/steps/02_check.ipynb',
  'output': 'output/default/check.ipynb',
  'upstream': ['acquire'],
  'parameters': {'run': 'default',
                 'min_per_class': 5,
                 'min_px': 16,
                 'max_unreadable': 0.0,
                 'max_passed_over': 0.0,
                 'max_imbalance': 20.0,
                 'pictures': 'warn',
                 'backbone': True,
                 'near_copies': 'warn',
                 'reference': 'champion',
                 'schema_skew': 'fail',
                 'value_skew': 'warn'}},
 {'name': 'prepare',
  'notebook': 'nbs/steps/03_prepare.ipynb',
  'output': 'output/default/prepare.ipynb',
  'upstream': ['acquire', 'check'],
  'parameters': {'run': 'default',
                 'size': None,
                 'grayscale': False,
                 'antialias': True,
                 'background': 'auto'}},
 {'name': 'train',
  'notebook': 'nbs/steps/04_train.ipynb',
  'output': 'output/default/train.ipynb',
  'upstream': ['acquire', 'prepare'],
  'parameters': {'run': 'default',
                 'seed': 7,
                 'network': 'auto',
                 'pool': 1,
                 'width': 32,
                 'embedding': 64,
                 'dropout': 0.2,
                 'epochs': 40,
                 'batch_size': 16,
                 'lr': 0.003,
                 'schedule': 'cosine',
                 'augment': 'auto',
                 'views': 3,
                 'finetune_epochs': 0,
                 'finetune_lr': 0.0001,
                 'label_smoothing': 0.05,
                 'class_weights': 'auto',
                 'patience': 0,
                 'start_from': None,
                 'uri': None,
                 'experiment': 'celestial'}},
 {'name': 'evaluate',
  'notebook': 'nbs/steps/05_evaluate.ipynb',
  'output': 'output/default/evaluate.ipynb',
  'upstream': ['acquire', 'prepare', 'train'],
  'parameters': {'run': 'default',
                 'seed': 7,
                 'on': 'test',
                 'false_alarms': 0.02,
                 'bootstrap': 1000,
                 'min_slice': 15,
                 'strangers': None,
                 'ood_images': 60,
                 'photos': None,
                 'domain': 'auto',
                 'slice_by': None}},
 {'name': 'explain',
  'notebook': 'nbs/steps/06_explain.ipynb',
  'output': 'output/default/explain.ipynb',
  'upstream': ['prepare', 'train', 'evaluate'],
  'parameters': {'run': 'default', 'per_class': 1, 'patch': 12, 'stride': 4}},
 {'name': 'package',
  'notebook': 'nbs/steps/07_package.ipynb',
  'output': 'output/default/package.ipynb',
  'upstream': ['acquire', 'prepare', 'train', 'evaluate'],
  'parameters': {'run': 'default',
                 'tolerance': 0.001,
                 'serve': 'float32',
                 'int8_loss': 0.002,
                 'title': None,
                 'noun': None,
                 'plural': None,
                 'purpose': None,
                 'colour': None}},
 {'name': 'register',
  'notebook': 'nbs/steps/08_register.ipynb',
  'output': 'output/default/register.ipynb',
  'upstream': ['acquire', 'check', 'prepare', 'train', 'evaluate', 'explain', 'package'],
  'parameters': {'run': 'default',
                 'name': 'celestial',
                 'publish': True,
                 'min_accuracy': 0.9,
                 'min_macro_f1': 0.9,
                 'min_class_f1': 0.7,
                 'min_slice': 0.6,
                 'max_slice_gap': 0.25,
                 'max_ece': 0.1,
                 'max_false_alarms': 0.05,
                 'max_ms': 25.0,
                 'max_mb': 20.0,
                 'max_difference': 0.001,
                 'must_beat': ['trivial', 'guide-baseline'],
                 'require_stress': False,
                 'min_paired': 20,
                 'alpha': 0.05,
                 'not_worse_by': 0.0,
                 'max_doubt': 0.05,
                 'promote': 'not_worse',
                 'new_baseline': None,
                 'origin': None,
                 'licence': None,
                 'creator': None,
                 'url': None,
                 'uri': None,
                 'experiment': 'celestial'}}]


class Step(PapermillOperator):
    "Execute a notebook in the project's folder and environment, and write its page."

    template_fields = ()  # a parameter isn't a template

    def execute(self, context):
        os.chdir(PROJECT)
        notebook = Path(self.output_nb)
        notebook.parent.mkdir(parents=True, exist_ok=True)
        super().execute(context)
        subprocess.run(["env", f"PATH={PATH}", *PAGE.split(), notebook], check=True)


with DAG('celestial-default', schedule=None, **ONE):
    done = {}
    for step in STEPS:
        files = {"input_nb": step["notebook"], "output_nb": step["output"]}
        task = Step(task_id=step["name"], kernel_name=KERNEL, parameters=step["parameters"], **files)
        task.set_upstream([done[name] for name in step["upstream"]])
        done[step["name"]] = task

with DAG('celestial-default-retrain', schedule='0 * * * *', **ONE):
    command = 'celestial monitor check --params default; celestial retrain default --if-triggered'  # the answer is the training's
    BashOperator(task_id="retrain", bash_command=command, cwd=str(PROJECT), env={"PATH": PATH}, append_env=True)
