"""Settings of `--plan true`, and the plan's file: everything that a training needs of it without computing one."""

from dataclasses import dataclass
from pathlib import Path

from rm import json_keys
from rm.config import SettingsGroup, changed_settings, require_positive, setting
from rm.distributed import process_group as dist
from rm.json_keys import Key
from rm.training.settings import TrainingSettings

FILE = "plan.json"
GIB = 2**30
KEYS = {  # of the plan's file, as far as it is read
    "peak": Key(float, minimum=1, required=True),
    "processes": Key(int, minimum=1, required=True),
    "settings": Key(dict, required=True),
}


@dataclass(frozen=True, kw_only=True)
class PlanSettings(SettingsGroup):
    """Plan"""

    plan: bool = setting(
        False, "print what this run would need and take, and stop: no GPU is used, no weights are read", may_change=True
    )
    world_size: int | None = setting(
        None, "processes to plan for, one for each GPU; none: as many as were started", may_change=True
    )
    device_memory_gb: float = setting(80.0, "memory of a GPU in GiB", may_change=True)
    device_tflops: float | None = setting(
        None,
        "peak throughput of a GPU in 10^12 operations per second (A100 312, H100 989 in bfloat16), for a time by "
        "--device_utilization; none: in bfloat16 times of six GPUs on paper (docs/scale.md), in float32 none",
        may_change=True,
    )
    device_utilization: float | None = setting(
        None,
        "MFU that you expect or have measured: the share of --device_tflops which training reaches",
        may_change=True,
    )

    def check(self) -> None:
        require_positive(
            device_memory_gb=self.device_memory_gb,
            device_tflops=self.device_tflops,
            device_utilization=self.device_utilization,
            world_size=self.world_size,
        )
        if (self.device_tflops is None) != (self.device_utilization is None):
            raise ValueError("--device_tflops and --device_utilization give a time together: give both, or none")
        if self.device_utilization is not None and self.device_utilization > 1:
            raise ValueError(f"--device_utilization is a share, at most 1, got {self.device_utilization}")


def compare_with_plan(settings: TrainingSettings) -> None:
    """At the end of a run: print the peak memory of rank 0 and, where there is a plan, what it had predicted."""
    file, peak = Path(settings.run.output_dir) / FILE, dist.peak_memory()
    what = "allocated" if dist.device().type == "cuda" else "resident, including Python and libraries"
    message = f"memory: {peak / GIB:.2f} GiB at the peak ({what})"
    if file.is_file():
        message += _planned(file, peak, settings)
    dist.say(message)


def _planned(file: Path, peak: int, settings: TrainingSettings) -> str:
    """What a plan had predicted, in words. A damaged file fails no run whose model is saved."""
    try:
        plan = json_keys.read(file, KEYS, others=True)
    except (OSError, ValueError) as error:
        return f"; the plan cannot be read: {error}"
    planned = f", planned {plan['peak'] / GIB:.2f}"
    if differing := _differing(plan, settings):
        return f"{planned} with another {', '.join(differing)}"
    return f"{planned}: {peak / plan['peak'] - 1:+.1%}"


def _differing(plan: dict, settings: TrainingSettings) -> list[str]:
    """The settings that change what a run needs, and that differ between the plan and the run."""
    names = list(changed_settings(settings, plan["settings"]))
    used = {
        "max_tokens": settings.packing.max_tokens,
        "gradient_checkpointing": settings.memory.gradient_checkpointing,
        "world_size": dist.world_size(),
    }
    planned = plan["settings"] | {"world_size": plan["processes"]}
    return names + [name for name, value in used.items() if planned.get(name) != value]
