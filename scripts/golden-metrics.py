#!/usr/bin/env python3
"""Writes tests/fixtures/trec_eval.json: a made-up run, its judgments and what trec_eval makes of them.

Needs pytrec-eval-terrier (trec_eval itself, as a Python module). Run from anywhere: python3 scripts/golden-metrics.py

The case is made to tell implementations apart: scores that are equal or differ only beyond single precision, ids whose
order as text is not their order as numbers, negative grades, unjudged documents, relevant documents that were not
retrieved, a query without a relevant document, one without any result, and one with more than 1,000 results.
"""

import json
import pathlib
import random

import pytrec_eval

MEASURES = {"ndcg_cut.10", "recip_rank", "recall.100", "map_cut.1000"}


def make_query(rng, documents, retrieved, judged, distinct_scores):
    """One query's results and judgments; few distinct scores mean many ties."""
    ids = rng.sample(documents, retrieved)
    scores = [round(rng.uniform(-1, 1), 3) for _ in range(distinct_scores)]
    run = {}
    for document in ids:
        score = rng.choice(scores)
        if rng.random() < 0.1:
            score += rng.choice([-1, 1]) * 1e-10  # vanishes in single precision
        run[document] = score
    found = rng.sample(ids, min(judged, len(ids)))
    missed = rng.sample([d for d in documents if d not in run], max(1, judged // 5))
    grades = {d: rng.choice([-2, -1, 0, 0, 1, 1, 2, 3]) for d in found + missed}
    return run, grades


def main():
    rng = random.Random(20240611)
    documents = [str(i) for i in range(1, 1400)] + [f"d{i}" for i in range(50)] + ["Ä", "é", "Z", "a-b"]
    run, qrels = {}, {}
    for number in range(1, 31):
        retrieved = rng.choice([1, 5, 9, 11, 40, 120])
        run[str(number)], qrels[str(number)] = make_query(
            rng, documents, retrieved, judged=rng.choice([1, 4, 15, 30]), distinct_scores=rng.choice([1, 3, 8, 200])
        )
    run["deep"], qrels["deep"] = make_query(rng, documents, 1200, judged=200, distinct_scores=40)
    run["none-relevant"], _ = make_query(rng, documents, 20, judged=1, distinct_scores=3)
    qrels["none-relevant"] = {document: -(i % 2) for i, document in enumerate(run["none-relevant"])}
    run["none-found"], qrels["none-found"] = {}, {"10": 1, "9": 2}

    results = pytrec_eval.RelevanceEvaluator(qrels, MEASURES).evaluate(run)
    per_query = {}
    for query in sorted(qrels):
        result = results[query]
        reciprocal = result["recip_rank"]
        per_query[query] = {
            "ndcg_at_10": result["ndcg_cut_10"],
            "mrr_at_10": reciprocal if reciprocal > 0 and round(1 / reciprocal) <= 10 else 0.0,
            "recall_at_100": result["recall_100"],
            "map": result["map_cut_1000"],
        }
    # As trec_eval -c does: over all judged queries.
    names = ["ndcg_at_10", "mrr_at_10", "recall_at_100", "map"]
    mean = {name: sum(values[name] for values in per_query.values()) / len(qrels) for name in names}

    fixture = {"run": run, "qrels": qrels, "per_query": per_query, "mean": mean}
    path = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "trec_eval.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fixture, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(qrels)} queries, {path.stat().st_size} bytes, mean {mean}")


if __name__ == "__main__":
    main()
