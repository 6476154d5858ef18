"""Made-up but realistic results of a comparison: eighteen methods, four domains, three seeds, some ablations."""

import random
from typing import Any

DOMAINS = ["general", "code", "math", "stories"]
POSITIONS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
# Name -> average loss, trained / total / active parameters in millions, tokens in millions, 10^12 FLOPs, seconds.
METHODS: dict[str, tuple[float, float, float, float, float, float, float]] = {
    "seed": (2.41, 4.2, 4.2, 4.2, 16.4, 413.0, 812.0),
    "expert-code": (2.95, 4.2, 4.2, 4.2, 8.2, 206.0, 406.0),
    "expert-math": (2.88, 4.2, 4.2, 4.2, 8.2, 206.0, 401.0),
    "expert-stories": (3.40, 4.2, 4.2, 4.2, 8.2, 206.0, 410.5),
    "dense-data-matched": (2.281, 4.2, 4.2, 4.2, 4.1, 103.0, 203.0),
    "dense-compute-matched": (2.190, 4.2, 4.2, 4.2, 33.0, 830.0, 1640.0),
    "soup": (2.74, 0, 4.2, 4.2, 0, 0, 3.2),
    "btm": (2.162, 0, 16.8, 16.8, 0, 0, 1.4),
    "expert-routing": (2.171, 0.0011, 16.8, 4.2, 4.1, 35.0, 80.0),
    "btx-top2": (2.166, 9.9, 9.9, 6.1, 4.1, 151.0, 330.0),
    "btx-switch": (2.204, 9.9, 9.9, 4.2, 4.1, 103.0, 260.0),
    "btx-soft": (2.158, 9.9, 9.9, 9.9, 4.1, 246.0, 480.0),
    "btx-sample": (2.209, 9.9, 9.9, 4.2, 4.1, 104.0, 262.0),
    "sparse-upcycling": (2.262, 9.9, 9.9, 6.1, 4.1, 151.0, 331.0),
    "bam": (2.151, 12.1, 12.1, 8.3, 4.1, 205.0, 420.0),
    "bam-adapters": (2.172, 10.2, 12.4, 8.4, 4.1, 207.0, 433.0),
    "bts": (2.118, 0.53, 17.3, 17.3, 4.1, 151.0, 350.0),
    "bts-mixture": (2.109, 0.53, 17.3, 17.3, 4.1, 153.0, 356.0),
    "bts, K = 1": (2.143, 0.07, 16.9, 16.9, 4.1, 140.0, 310.0),
    "bts, token gates": (2.121, 0.27, 17.0, 17.0, 4.1, 148.0, 345.0),
    "bts-mixture, stream unchanged": (2.115, 0.53, 17.3, 17.3, 4.1, 153.0, 351.0),
}


def realistic_result(seeds: int = 3) -> dict[str, Any]:
    """The content of a comparison.json of so many seeds; the same one every time."""
    rng = random.Random(3)
    away = {domain: 0.3 * (place - 1.5) for place, domain in enumerate(DOMAINS)}
    spread = 0.0 if seeds == 1 else 1.0
    methods: dict[str, Any] = {}
    for name, (average, *costs) in METHODS.items():
        losses = {domain: average + off + rng.gauss(0, 0.02) for domain, off in away.items()}
        if name.startswith("expert-") and name != "expert-routing":
            losses = {domain: 2.0 + away[domain] if domain in name else loss for domain, loss in losses.items()}
        average = sum(losses.values()) / len(losses)
        mixed = 2.62 + 0.9 * (average - 2.41) + (0.21 if name == "btm" else 0.0)
        gain = average - 2.41
        trained, total, active, tokens, flops, seconds = costs
        methods[name] = {
            "losses": losses,
            "average": average,
            "spread": spread * rng.uniform(0.003, 0.02),
            "averages": [average] * seeds,
            "mixed": mixed,
            "mixed_spread": spread * rng.uniform(0.003, 0.02),
            "by_position": [
                (place, 5.2 - 0.45 * i + gain * min(1.0, 0.3 + 0.1 * i)) for i, place in enumerate(POSITIONS)
            ],
            "mixed_by_position": [
                (place, 5.3 - 0.42 * i + gain * (1 - 0.13 * i if name == "btm" else 0.9))
                for i, place in enumerate(POSITIONS)
            ],
            "trained_params": round(trained * 1e6),
            "total_params": round(total * 1e6),
            "active_params": round(active * 1e6),
            "tokens": round(tokens * 1e6),
            "flops": flops * 1e12,
            "seconds": seconds,
        }
    members = [methods[name]["losses"] for name in ("seed", "expert-code", "expert-math", "expert-stories")]
    best = {domain: min(losses[domain] for losses in members) for domain in DOMAINS}
    oracle = {"losses": best, "average": sum(best.values()) / len(best), "spread": spread * 0.008}
    return {
        "domains": list(DOMAINS),
        "seeds": list(range(1, seeds + 1)),
        "minutes": 60,
        "preset": "tiny",
        "methods": methods,
        "oracle": oracle,
    }


def with_studies(result: dict[str, Any]) -> dict[str, Any]:
    """The result with a task for two experts, and experts taken out and put in."""
    methods = result["methods"]
    cross = {name: {"average": entry["average"] + 0.4, "spread": 0.01} for name, entry in methods.items()}
    cross["bts with some"] = {"average": 1.9, "spread": 0.01}
    bts = methods["bts"]["losses"]
    changes = {"bts": bts, "bts without code": bts | {"code": 2.3}, "bts-few": bts | {"stories": 2.9}}
    changes |= {"bts-added-start": bts | {"stories": 2.9}, "bts-added": bts | {"stories": 2.6}}
    return {
        **result,
        "cross-capability": cross,
        "changes": {
            name: {"losses": losses, "average": sum(losses.values()) / 4, "spread": 0.01}
            for name, losses in changes.items()
        },
        "added": {"expert": "stories", "losses": [(i * 270_000, 2.6 + 0.3 / (i + 1)) for i in range(16)]},
    }
