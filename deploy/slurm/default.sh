#!/bin/bash
# The pipeline on SLURM, a job for each step. Written by `celestial deploy slurm default`; after a change write it anew.
# From a folder that all nodes share, with the project's environment active:
#   bash deploy/slurm/default.sh [options of sbatch, such as --partition=cpu --mem=4G]
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../.."
mkdir -p output/default/logs
options=("$@")
declare -A id

# One job at a time (singleton), also of two submissions: the steps share the run's folder.
job() { # a step, and the steps that it waits for; the script is on standard input
  local after="" step
  for step in "${@:2}"; do after+=":${id[$step]}"; done
  sbatch --parsable --job-name=celestial-default --comment="$1" --output=output/default/logs/"$1-%j.log" \
    --dependency="singleton${after:+,afterok$after}" --kill-on-invalid-dep=yes "${options[@]}"
}

id[acquire]=$(job acquire <<'JOB'
#!/bin/bash
set -euo pipefail
papermill nbs/steps/01_acquire.ipynb output/default/acquire.ipynb -y 'run: default
seed: 7
source: render
sources: []
folder: null
labels: null
test_folder: null
per_class: 150
image_px: 128
maps: null
split: auto
groups: []
split_file: null
val: 0.15
test: 0.2
test_source: null'
jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage output/default/acquire.ipynb
JOB
)
id[acquire]=${id[acquire]%%;*} # without the cluster's name
echo "acquire: job ${id[acquire]}"

id[check]=$(job check acquire <<'JOB'
#!/bin/bash
set -euo pipefail
papermill nbs/steps/02_check.ipynb output/default/check.ipynb -y 'run: default
min_per_class: 5
min_px: 16
max_unreadable: 0.0
max_passed_over: 0.0
max_imbalance: 20.0
pictures: warn
backbone: true
near_copies: warn
reference: champion
schema_skew: fail
value_skew: warn'
jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage output/default/check.ipynb
JOB
)
id[check]=${id[check]%%;*} # without the cluster's name
echo "check: job ${id[check]}"

id[prepare]=$(job prepare acquire check <<'JOB'
#!/bin/bash
set -euo pipefail
papermill nbs/steps/03_prepare.ipynb output/default/prepare.ipynb -y 'run: default
size: null
grayscale: false
antialias: true
background: auto'
jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage output/default/prepare.ipynb
JOB
)
id[prepare]=${id[prepare]%%;*} # without the cluster's name
echo "prepare: job ${id[prepare]}"

id[train]=$(job train acquire prepare <<'JOB'
#!/bin/bash
set -euo pipefail
papermill nbs/steps/04_train.ipynb output/default/train.ipynb -y 'run: default
seed: 7
network: auto
pool: 1
width: 32
embedding: 64
dropout: 0.2
epochs: 40
batch_size: 16
lr: 0.003
schedule: cosine
augment: auto
views: 3
finetune_epochs: 0
finetune_lr: 0.0001
label_smoothing: 0.05
class_weights: auto
patience: 0
start_from: null
uri: null
experiment: celestial'
jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage output/default/train.ipynb
JOB
)
id[train]=${id[train]%%;*} # without the cluster's name
echo "train: job ${id[train]}"

id[evaluate]=$(job evaluate acquire prepare train <<'JOB'
#!/bin/bash
set -euo pipefail
papermill nbs/steps/05_evaluate.ipynb output/default/evaluate.ipynb -y 'run: default
seed: 7
'"'"'on'"'"': test
false_alarms: 0.02
bootstrap: 1000
min_slice: 15
strangers: null
ood_images: 60
photos: null
domain: auto
slice_by: null'
jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage output/default/evaluate.ipynb
JOB
)
id[evaluate]=${id[evaluate]%%;*} # without the cluster's name
echo "evaluate: job ${id[evaluate]}"

id[explain]=$(job explain prepare train evaluate <<'JOB'
#!/bin/bash
set -euo pipefail
papermill nbs/steps/06_explain.ipynb output/default/explain.ipynb -y 'run: default
per_class: 1
patch: 12
stride: 4'
jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage output/default/explain.ipynb
JOB
)
id[explain]=${id[explain]%%;*} # without the cluster's name
echo "explain: job ${id[explain]}"

id[package]=$(job package acquire prepare train evaluate <<'JOB'
#!/bin/bash
set -euo pipefail
papermill nbs/steps/07_package.ipynb output/default/package.ipynb -y 'run: default
tolerance: 0.001
serve: float32
int8_loss: 0.002
title: null
noun: null
plural: null
purpose: null
colour: null'
jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage output/default/package.ipynb
JOB
)
id[package]=${id[package]%%;*} # without the cluster's name
echo "package: job ${id[package]}"

id[register]=$(job register acquire check prepare train evaluate explain package <<'JOB'
#!/bin/bash
set -euo pipefail
papermill nbs/steps/08_register.ipynb output/default/register.ipynb -y 'run: default
name: celestial
publish: true
min_accuracy: 0.9
min_macro_f1: 0.9
min_class_f1: 0.7
min_slice: 0.6
max_slice_gap: 0.25
max_ece: 0.1
max_false_alarms: 0.05
max_ms: 25.0
max_mb: 20.0
max_difference: 0.001
must_beat:
- trivial
- guide-baseline
require_stress: false
min_paired: 20
alpha: 0.05
not_worse_by: 0.0
max_doubt: 0.05
promote: not_worse
new_baseline: null
origin: null
licence: null
creator: null
url: null
uri: null
experiment: celestial'
jupyter nbconvert --log-level=ERROR --to=celestial_ml.core.notebook_page.NotebookPage output/default/register.ipynb
JOB
)
id[register]=${id[register]%%;*} # without the cluster's name
echo "register: job ${id[register]}"
