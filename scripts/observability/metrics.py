"""The one list of metrics that cpcr has, with their types and labels; and /metrics held to it.

shipped.py holds dashboard and alerts to it, check.py a run's exposition, traces.py what comes by OTLP. What it is not: what metrics
mean; docs/observability.md says that. The standard library only.
"""

import re

from basics import Failed

RANK = ("node", "rank")
# What the coordinator says at /metrics: type and labels. By OTLP the same, with dots for the underscores between words.
METRICS = {
    "cpcr_run_info": ("gauge", ("run", "method", "version")),
    "cpcr_steps_done": ("gauge", ()),
    "cpcr_steps_wanted": ("gauge", ()),
    "cpcr_images_per_second": ("gauge", ()),
    "cpcr_loss": ("gauge", ("term",)),
    "cpcr_learning_rate": ("gauge", ()),
    "cpcr_consistency_weight": ("gauge", ()),
    "cpcr_validation_dice": ("gauge", ("class",)),
    "cpcr_validation_mean_dice": ("gauge", ()),
    "cpcr_validation_step": ("gauge", ()),
    "cpcr_workers": ("gauge", ()),
    "cpcr_workers_wanted": ("gauge", ()),
    "cpcr_generation": ("gauge", ()),
    "cpcr_heartbeat_age_seconds": ("gauge", ("node",)),
    "cpcr_step_seconds": ("gauge", RANK),
    "cpcr_step_own_seconds": ("gauge", RANK),
    "cpcr_step_own_seconds_median": ("gauge", ()),
    "cpcr_straggler": ("gauge", RANK),
    "cpcr_data_wait_ratio": ("gauge", RANK),
    "cpcr_trainer_steps_total": ("counter", RANK),
    "cpcr_phase_seconds_total": ("counter", (*RANK, "phase")),
    "cpcr_loader_queue_batches": ("gauge", RANK),
    "cpcr_read_requests_total": ("counter", RANK),
    "cpcr_read_bytes_total": ("counter", RANK),
    "cpcr_read_retries_total": ("counter", (*RANK, "kind")),
    "cpcr_cache_hits_total": ("counter", RANK),
    "cpcr_cache_misses_total": ("counter", RANK),
    "cpcr_checkpoint_step": ("gauge", ()),
    "cpcr_checkpoint_age_seconds": ("gauge", ()),
    "cpcr_checkpoint_hold_seconds": ("gauge", ()),
    "cpcr_checkpoint_upload_seconds": ("gauge", ()),
    "cpcr_checkpoint_bytes": ("gauge", ()),
    "cpcr_checkpoints_total": ("counter", ()),
    "cpcr_interruptions_total": ("counter", ("kind",)),
    "cpcr_last_outage_seconds": ("gauge", ()),
    "cpcr_time_seconds_total": ("counter", ("part",)),
    "cpcr_goodput_ratio": ("gauge", ()),
    "cpcr_process_memory_bytes": ("gauge", RANK),
    "cpcr_gpu_memory_bytes": ("gauge", RANK),
    "cpcr_page_faults_total": ("counter", RANK),
    "cpcr_finished": ("gauge", ()),
}
# What it says besides. Dashboard and alerts do without.
BESIDES = {
    "cpcr_eta_seconds": ("gauge", ()),
    "cpcr_start_time_seconds": ("gauge", ()),
    "cpcr_notes": ("gauge", ()),
    "cpcr_hints": ("gauge", ()),
    "cpcr_validation_best_dice": ("gauge", ()),
}
# A small run on CPUs need not have these: there is no GPU, and a disk seldom has to be asked again.
MAY_BE_ABSENT = {"cpcr_gpu_memory_bytes", "cpcr_read_retries_total"}
PHASES = ("data_wait", "copy_to_device", "forward", "loss", "backward", "all_reduce_wait", "optimiser", "checkpoint_hold")
PARTS = {"waiting", "starting", "training", "rework", "validation", "saving", "recovery", "joining", "stopping"}


def parsed(text):
    """Types and (name, labels, value) of an exposition."""
    types, samples = {}, []
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            types[name] = kind
        elif line and not line.startswith("#"):
            match = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?", line)
            if not match:
                raise Failed(f"/metrics: a line that is none: {line}")
            labels = dict(re.findall(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            samples.append((match[1], labels, float(match[3])))
    return types, samples


def held_to_the_list(text):
    """The exposition has the names, types and labels of METRICS and BESIDES, and no others. Returns which of METRICS it lacks."""
    types, samples = parsed(text)
    for name, labels, _ in samples:
        if name not in METRICS | BESIDES:
            raise Failed(f"/metrics: {name} is not in the list")
        kind, wanted = (METRICS | BESIDES)[name]
        if types.get(name) != kind:
            raise Failed(f"/metrics: {name} is a {types.get(name)}, not a {kind}")
        if set(labels) != set(wanted):
            raise Failed(f"/metrics: {name} has the labels {sorted(labels)}, not {sorted(wanted)}")
    for name, label, known in (("cpcr_phase_seconds_total", "phase", set(PHASES)), ("cpcr_time_seconds_total", "part", PARTS)):
        strange = {labels[label] for told, labels, _ in samples if told == name} - known
        if strange:
            raise Failed(f"/metrics: {name} has a {label} that is not in the list: {', '.join(sorted(strange))}")
    return set(METRICS) - {name for name, _, _ in samples}
