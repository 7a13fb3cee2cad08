"""What removing layers is measured against in `quality.py`, and is no option of llm_snp."""

from __future__ import annotations

import torch

from llm_snp.dense.skeleton import run_block
from llm_snp.pruning.plan import Plan
from llm_snp.pruning.session import Session


def least_influential(session: Session) -> Plan:
    """Without the blocks whose output is most like their input: 1 - cosine, mean over tokens (arXiv 2403.03853)."""
    skeleton, stream, influence = session.skeleton, session.stream(), []
    for index, state in skeleton.block_states(range(len(skeleton))):
        block, total = skeleton.load_block(index, state), 0.0
        for rows, hidden, call in stream.batches(index):
            hidden = hidden.clone()  # which may be a view of what is overwritten
            output = run_block(block, hidden, call)
            total += (1 - torch.cosine_similarity(hidden.float(), output.float(), dim=-1)).sum().item()
            stream.put(rows, output)
        influence.append(total)
    order = sorted(range(1, len(influence)), key=influence.__getitem__)  # the first one stays, as in llm_snp
    blocks = skeleton.blocks
    base = [session.family.linear_parameters(block, session.config) for block in blocks]
    count = min(len(order), round(session.options.sparsity * sum(base) / base[0]))
    whole = {site.unit: site.units for site in session.sites(0)}
    kept = tuple(dict.fromkeys(whole, 0) if index in order[:count] else whole for index in range(len(blocks)))
    removed = sum(base[index] for index in order[:count])
    return Plan(kept, (), "loss", session.options.sparsity * sum(base), removed, sum(base), structures="layers")
