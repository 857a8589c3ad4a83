#!/bin/bash
# Train on one node or several. Before the job's time is over, the run saves a checkpoint and goes back into the queue.
#
#     sbatch training/configs/slurm/train.sh --dataset_name ILSVRC/imagenet-1k --streaming --output_dir outputs/flow ...
#     sbatch --nodes 8 training/configs/slurm/train.sh ...
#     CONFIG=training/configs/accelerate/fsdp2.yaml sbatch training/configs/slurm/train.sh ...
#
# The arguments are those of training/train_rra.py. CONFIG is an optional configuration of Accelerate.
#
#SBATCH --job-name=train_rra
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
# To this script only, ten minutes before the end: a step and a checkpoint must fit into them.
#SBATCH --signal=B:USR1@600

# The launcher hands signals on and waits for the checkpoint, instead of 30 seconds.
export PET_SIGNALS_TO_HANDLE=SIGUSR1,SIGTERM,SIGINT,SIGHUP,SIGQUIT
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540

launch=(
  accelerate launch ${CONFIG:+--config_file "$CONFIG"}
  --num_machines "$SLURM_NNODES"
  --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))"
  --main_process_ip "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  --main_process_port "$((20000 + SLURM_JOB_ID % 20000))"
)
train=(training/train_rra.py --save_on_signal SIGUSR1 --resume_from_checkpoint latest "$@")

signalled=
trap 'signalled=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# SIGUSR1 would end a launcher that does not handle it, and leave its processes behind. They listen to it by themselves.
srun bash -c 'trap "" USR1; exec "${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:$1+2}"' \
  launcher "${#launch[@]}" "${launch[@]}" "${train[@]}" &

# A signal interrupts `wait`, which gives the step's own code once it has ended.
while wait $!; kill -0 $! 2>/dev/null; do :; done
wait $!
code=$?

if [[ $signalled && $code -ne 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
