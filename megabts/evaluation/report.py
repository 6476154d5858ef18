"""Losses per domain as a table to read and as JSON."""

from collections.abc import Mapping
from typing import Any

from megabts.evaluation.perplexity import DomainLoss


def losses_json(results: Mapping[str, DomainLoss]) -> dict[str, dict[str, Any]]:
    """{domain: {loss, perplexity, bits_per_byte, tokens}}; loss in nats per token."""
    return {
        domain: {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
        }
        for domain, result in results.items()
    }


def losses_table(results: Mapping[str, DomainLoss]) -> str:
    """One line a domain and one for the average loss over domains."""
    width = max(len("average"), *map(len, results))
    lines = [f"{'domain':<{width}}  nats/token  perplexity  bits/byte     tokens"]
    for domain, result in results.items():
        bits = "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        lines.append(
            f"{domain:<{width}}  {result.loss:>10.4f}  {result.perplexity:>10.2f}  {bits:>9}  {result.tokens:>9,}"
        )
    mean = sum(result.loss for result in results.values()) / len(results)
    return "\n".join([*lines, f"{'average':<{width}}  {mean:>10.4f}"])
