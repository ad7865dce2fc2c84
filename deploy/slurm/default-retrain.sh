#!/bin/bash
# A look at the deployed model, and a training if a trigger has a reason, as one job; one at a time.
# Written by `celestial deploy slurm default`; after a change write it anew. For cron or scrontab, with the project's environment active:
#   0 * * * * bash deploy/slurm/default-retrain.sh [options of sbatch]
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../.."
mkdir -p output/default/logs
sbatch --parsable --job-name=celestial-default-retrain --output=output/default/logs/retrain-%j.log \
  --dependency=singleton "$@" <<'JOB'
#!/bin/bash
celestial monitor check --params default
celestial retrain default --if-triggered
JOB
