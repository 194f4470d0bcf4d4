# Sourced by the other launchers:  source launch/torchrun.sh
# Sets the array `torchrun`, the command that starts the processes of a script, and the environment variables that
# torchrun and its processes read. What each setting is for: launch/README.md.
#
#     "${torchrun[@]}" --standalone --nproc-per-node 8 train_rm.py --model_name_or_path ...
#
# MAX_RESTARTS: how often the processes are restarted in one job after one of them died (default 3)
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT: seconds from a stop signal to SIGKILL (default 100)
# PYTORCH_ALLOC_CONF: of CUDA's allocator (default expandable_segments:True)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
torchrun=(python -m torch.distributed.run --max-restarts "${MAX_RESTARTS:-3}"
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
