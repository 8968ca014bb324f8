"""Runs one keras-emr training job on a Ray cluster, a process on each of several workers.

``python ray_job.py --processes N [--port P] [--gpus G] -- train ...``: what follows ``--`` is the
command line of keras-emr. All processes need the data and the run's folder under the same path.
"""

import argparse
import os
import signal
import subprocess
import sys


def command(arguments):
    """The process's command; a run that has begun is resumed."""
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else None
    resume = out is not None and os.path.exists(os.path.join(out, "config.yaml"))
    again = ["--resume"] if resume and "--resume" not in arguments else []
    return [sys.executable, "-m", "keras_emr_cli.main", *arguments, *again]


def environment(coordinator, processes, process):
    """What tells a process its place (the flags --coordinator, --processes and --process)."""
    return {
        "KERAS_EMR_COORDINATOR": coordinator,
        "KERAS_EMR_PROCESSES": str(processes),
        "KERAS_EMR_PROCESS": str(process),
    }


def work(arguments, coordinator, processes, process):
    """One process of the job, on a worker; returns its exit code."""
    child = subprocess.Popen(
        command(arguments), env={**os.environ, **environment(coordinator, processes, process)}
    )
    try:
        return child.wait()
    finally:
        if child.poll() is None:  # cancelled: let it save
            child.send_signal(signal.SIGTERM)
            child.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--port", type=int, default=29500)
    parser.add_argument("--gpus", type=float, default=0, help="for each process")
    parser.add_argument("--cpus", type=float, default=1, help="for each process")
    parser.add_argument("arguments", nargs="+", help="of keras-emr, after --")
    given = parser.parse_args()

    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init()
    need = {"CPU": given.cpus, **({"GPU": given.gpus} if given.gpus else {})}
    group = placement_group([need] * given.processes, strategy="SPREAD")
    ray.get(group.ready())

    def on(bundle):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        return {
            "num_cpus": given.cpus,
            "num_gpus": given.gpus,
            "scheduling_strategy": place,
            "max_retries": 0,
        }

    address = ray.remote(ray.util.get_node_ip_address).options(**on(0))
    coordinator = f"{ray.get(address.remote())}:{given.port}"
    waiting = [
        ray.remote(work).options(**on(i)).remote(given.arguments, coordinator, given.processes, i)
        for i in range(given.processes)
    ]
    codes = []
    while waiting:
        done, waiting = ray.wait(waiting)
        codes += ray.get(done)
        if codes[-1]:  # the others would wait for it
            for task in waiting:
                ray.cancel(task)
            break
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()
