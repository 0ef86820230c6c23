"""Who goes where: from scores to (token, expert) pairs. Nothing here has a gradient.

Token choice returns K experts of each token, [V, K]. The others return which pairs are made, as a
mask [V, E]. `V` tokens that are no padding, `E` experts, `G` groups, `P` pairs, `N` sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_vlm.models.moe.peers import Alone
from titan_vlm.models.moe.tokens import Tokens

CHUNKS = 2**20  # more than any sequence has


def best_groups(scores_VE: Tensor, num_groups: int, chosen_groups: int) -> Tensor:
    """`scores_VE`, with -inf for experts outside of each token's best groups.

    A group is as good as the sum of its two best experts (DeepSeek-V3, arXiv 2412.19437, section
    2.1.2). Not 0 for the others: a biased score may be negative, and 0 would win.
    """
    scores_VGe = scores_VE.unflatten(-1, (num_groups, -1))
    groups_VG, _ = _group_values(scores_VE, num_groups)
    chosen = groups_VG.topk(chosen_groups, dim=-1).indices
    inside_VG = torch.zeros_like(groups_VG, dtype=torch.bool).scatter_(-1, chosen, True)
    return scores_VGe.masked_fill(~inside_VG.unsqueeze(-1), -torch.inf).flatten(-2)


def shift_to_enter(scores_VE: Tensor, num_groups: int, chosen_groups: int) -> Tensor:
    """[V, E] how far the scores of an expert's whole group must rise for it to be among the best by
    `best_groups`; below 0: how far they may fall."""
    groups_VG, counted = _group_values(scores_VE, num_groups)
    # What a group must beat: the last of the chosen ones among the others.
    best_VC = F.pad(groups_VG, (0, 1), value=-torch.inf).topk(chosen_groups + 1, dim=-1).values
    last_in, first_out = best_VC[:, -2:-1], best_VC[:, -1:]
    rival_VG = torch.where(groups_VG >= last_in, first_out, last_in)
    shift_VG = (rival_VG - groups_VG) / counted
    return shift_VG.repeat_interleave(scores_VE.shape[1] // num_groups, dim=1)


def _group_values(scores_VE: Tensor, num_groups: int) -> tuple[Tensor, int]:
    """[V, G], each the sum of the best experts of a group; and of how many."""
    scores_VGe = scores_VE.unflatten(-1, (num_groups, -1))
    counted = min(2, scores_VGe.shape[-1])
    return scores_VGe.topk(counted, dim=-1).values.sum(-1), counted


def taking_turns(tokens: Tokens, num_experts: int, top_k: int) -> Tensor:
    """[V, K] experts that are loaded evenly by every sequence, whatever the scores are."""
    first_V = (tokens.keys_N % num_experts).index_select(0, tokens.sequence_V)
    turn_V = first_V + tokens.place_V * top_k
    turns_K = torch.arange(top_k, device=turn_V.device)
    return (turn_V.unsqueeze(1) + turns_K) % num_experts


def ranks_within(groups_P: Tensor, *keys_P: Tensor) -> Tensor:
    """Each pair's rank, from 0 on, among those of its group, ascending by the keys, the first key
    counting most; pairs that are equal keep their order."""
    order_P = torch.arange(groups_P.numel(), device=groups_P.device)
    for key_P in reversed((groups_P, *keys_P)):
        order_P = order_P[key_P[order_P].argsort(stable=True)]
    sorted_P = groups_P[order_P]
    places_P = torch.arange(groups_P.numel(), device=groups_P.device)
    is_first_P = torch.ones_like(sorted_P, dtype=torch.bool)
    is_first_P[1:] = sorted_P[1:] != sorted_P[:-1]
    starts_P = (places_P * is_first_P).cummax(0).values if places_P.numel() else places_P
    return torch.empty_like(order_P).index_copy_(0, order_P, places_P - starts_P)


def capacity(tokens_N: Tensor, factor: float, top_k: int, num_experts: int) -> Tensor:
    """ceil(factor * K * T / E) for each number of tokens T, int64."""
    return (factor * top_k * tokens_N.double() / num_experts).ceil().long()


def sequence_lengths(tokens: Tokens, peers: Alone) -> Tensor:
    """[N] tokens of each sequence, also those that other ranks hold."""
    lens_N = torch.zeros_like(tokens.keys_N)
    lens_N.index_add_(0, tokens.sequence_V, torch.ones_like(tokens.sequence_V))
    return peers.sum(lens_N)


def expert_choice(
    scores_VE: Tensor,
    tokens: Tokens,
    peers: Alone,
    factor: float,
    top_k: int,
    chunk: int,
    fallback: bool,
) -> Tensor:
    """Each expert takes the C best of every sequence's T tokens, C = min(T, ceil(factor K T / E)).

    Expert choice (Zhou et al. 2022, arXiv 2202.09368), within a sequence, so that what else is in
    the batch changes nothing. Equal scores go to the earlier token.

    Args:
        peers: the ranks that hold other tokens of these sequences.
        chunk: if above 0, T tokens are those of a chunk of so many.
        fallback: add for each token that nobody took its best expert.

    Returns:
        [V, E] bool.
    """
    num_experts = scores_VE.shape[1]
    sequence_V, chunk_V = tokens.sequence_V, torch.zeros_like(tokens.place_V)
    here_V = sequence_lengths(tokens, peers)[sequence_V]
    if chunk:
        chunk_V = tokens.place_V // chunk
        here_V = (here_V - chunk_V * chunk).clamp(max=chunk)
    experts_E = torch.arange(num_experts, device=scores_VE.device)
    groups_VE = (sequence_V * CHUNKS + chunk_V).unsqueeze(1) * num_experts + experts_E
    places_VE = tokens.place_V.unsqueeze(1).expand_as(groups_VE)
    columns = (groups_VE.flatten(), -scores_VE.detach().flatten(), places_VE.flatten())
    gathered, own = peers.gather(*columns)
    ranks_VE = ranks_within(*gathered)[own].view_as(scores_VE)
    room_V = capacity(here_V, factor, top_k, num_experts)  # T itself is never exceeded
    taken_VE = ranks_VE < room_V.unsqueeze(1)
    if fallback:
        best_V1 = scores_VE.argmax(-1, keepdim=True)
        alone_V1 = ~taken_VE.any(-1, keepdim=True)
        taken_VE = taken_VE.scatter(1, best_V1, taken_VE.gather(1, best_V1) | alone_V1)
    return taken_VE


def within_capacity(
    token_P: Tensor,
    experts_P: Tensor,
    scores_P: Tensor,
    tokens: Tokens,
    num_experts: int,
    top_k: int,
    factor: float,
    minimum: int,
    scope: str,
    by: str,
    peers: Alone,
) -> Tensor:
    """Which pairs find room: at most max(minimum, ceil(factor K T / E)) of an expert's, [P] bool.

    Args:
        token_P: which of the V tokens each pair is of.
        scope: "sequence", or everything that `peers` hold together.
        by: "position" keeps the earliest in their sequences, "score" the highest.
        peers: the ranks within the scope.
    """
    sequence_P, place_P = tokens.sequence_V[token_P], tokens.place_V[token_P]
    if scope == "sequence":
        lens_P = sequence_lengths(tokens, peers)[sequence_P]
        groups_P, names = sequence_P * num_experts + experts_P, ()
    else:
        lens_P = peers.sum(torch.tensor(len(tokens), device=token_P.device)).expand_as(token_P)
        groups_P, names = experts_P, (tokens.keys_N[sequence_P],)
    first = () if by == "position" else (-scores_P.detach(),)
    gathered, own = peers.gather(groups_P, *first, place_P, *names)
    ranks_P = ranks_within(*gathered)[own]
    return ranks_P < capacity(lens_P, factor, top_k, num_experts).clamp(min=minimum)
