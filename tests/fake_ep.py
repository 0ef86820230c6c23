"""DeepEP's and HybridEP's buffers over gloo: the libraries' signatures, strictly, without a GPU.

They take float64 and CPU tensors, which the libraries do not. All else that the libraries demand is
asserted here: dtypes, shapes, contiguity, room in the buffer, handles they gave out themselves.
What an asynchronous call returns is rubbish until its event is waited for.
"""

import torch
import torch.distributed as dist
from torch import Tensor

NOT_YET = -777


class FakeEvent:
    """`EventOverlap`: `event` None unless the call was asynchronous."""

    def __init__(self, event=None, finish=()):
        self.event, self.finish = event, list(finish)

    def current_stream_wait(self):
        assert self.event is not None
        for tensor, value in self.finish:
            tensor.copy_(value)
        self.finish.clear()


class FakeConfig:
    def __init__(self, purpose: str, num_sms: int):
        self.purpose, self.num_sms = purpose, num_sms

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return (3 if self.purpose == "combine" else 2) * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks > 8, "NVSHMEM is disabled during compilation"
        return 5 * hidden_bytes * num_ranks


def exchange(value, group) -> list:
    """What each rank holds, in the order of the ranks."""
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def check_weights(weights: Tensor, x: Tensor) -> None:
    assert weights.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)


class FakeBuffer:
    """`deep_ep.Buffer`, and UCCL-EP's."""

    num_sms = 20
    made: list[tuple] = []  # SMs and calls of each; a buffer itself would keep its group alive

    def __init__(
        self,
        group,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ):
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.handles, self.calls = [], []
        FakeBuffer.made.append((self.num_sms, self.calls))

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        FakeBuffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> FakeEvent:
        return FakeEvent("captured")

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> FakeConfig:
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return FakeConfig("dispatch", FakeBuffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> FakeConfig:
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return FakeConfig("combine", FakeBuffer.num_sms)

    def get_dispatch_layout(
        self,
        topk_idx,
        num_experts,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        assert topk_idx.dtype == torch.int64 and topk_idx.dim() == 2 and topk_idx.is_contiguous()
        assert topk_idx.numel() == 0 or int(topk_idx.min()) >= -1
        assert topk_idx.numel() == 0 or int(topk_idx.max()) < num_experts
        per_rank, per_expert, in_rank = self._layout(topk_idx, num_experts)
        outputs = [per_rank, per_expert, in_rank]
        event = self._finish(outputs, previous_event, async_finish, allocate_on_comm_stream)
        return outputs[0], None, outputs[1], outputs[2], event

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self._check(x, config, "dispatch")
        again = handle is not None
        self.calls.append("dispatch again" if again else "dispatch")
        if async_finish and not again:
            previous_event.current_stream_wait()  # the layout must be there
        rank, ranks = self.group.rank(), self.group.size()
        if again:
            assert topk_idx is None and topk_weights is None
            self._check_handle(handle)
            in_rank, arrived_in_rank, _ = handle
            assert in_rank.shape[0] == x.shape[0]
            parts = exchange(x, self.group)
            recv_x = torch.cat([p[m[:, rank]] for p, m in zip(parts, arrived_in_rank, strict=True)])
            outputs = [recv_x]
            event = self._finish(outputs, previous_event, async_finish, allocate_on_comm_stream)
            return outputs[0], None, None, None, None, event
        check_weights(topk_weights, x)
        assert topk_idx.shape == topk_weights.shape and topk_weights.is_contiguous()
        assert topk_idx.shape[0] == x.shape[0] and topk_idx.shape[1] <= 32
        num_experts = num_tokens_per_expert.shape[0]
        given = (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
        for ours, theirs in zip(given, self._layout(topk_idx, num_experts), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        here = num_experts // ranks
        everyone = exchange((x, topk_idx, topk_weights, is_token_in_rank), self.group)
        mine = [[t[part[3][:, rank]] for t in part[:3]] for part in everyone]
        recv_x, recv_idx, recv_weights = (torch.cat(parts) for parts in zip(*mine, strict=True))
        recv_idx = recv_idx - rank * here
        away = (recv_idx < 0) | (recv_idx >= here)
        recv_idx, recv_weights = recv_idx.masked_fill(away, -1), recv_weights.masked_fill(away, 0)
        arrived = [int((recv_idx == e).sum()) for e in range(here)]
        new_handle = (is_token_in_rank, [part[3] for part in everyone], object())
        self.handles.append(new_handle)
        outputs = [recv_x, recv_idx, recv_weights]
        event = self._finish(outputs, previous_event, async_finish, allocate_on_comm_stream)
        return *outputs, arrived, new_handle, event

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self._check(x, config, "combine")
        self._check_handle(handle)
        self.calls.append("combine")
        in_rank, arrived_in_rank, _ = handle
        rank = self.group.rank()
        sizes = [int(m[:, rank].sum()) for m in arrived_in_rank]
        assert x.shape[0] == sum(sizes)
        tensors = [x]
        if topk_weights is not None:
            check_weights(topk_weights, x)
            assert topk_weights.is_contiguous() and topk_weights.shape[0] == x.shape[0]
            tensors.append(topk_weights)
        outputs = []
        for tensor in tensors:
            sent = exchange(tensor.split(sizes), self.group)
            total = tensor.new_zeros(in_rank.shape[0], tensor.shape[1])
            for source, parts in enumerate(sent):
                total[in_rank[:, source]] += parts[rank]
            outputs.append(total)
        event = self._finish(outputs, previous_event, async_finish, allocate_on_comm_stream)
        return outputs[0], outputs[1] if len(outputs) > 1 else None, event

    def _layout(self, topk_idx, num_experts):
        ranks = self.group.size()
        owner = torch.where(topk_idx < 0, ranks, topk_idx // (num_experts // ranks))
        in_rank = torch.stack([(owner == r).any(1) for r in range(ranks)], 1)
        chosen = topk_idx[topk_idx >= 0]
        per_expert = torch.bincount(chosen, minlength=num_experts).int()
        return in_rank.sum(0).int(), per_expert, in_rank

    def _check(self, x, config, purpose):
        assert x.dim() == 2 and x.is_contiguous()
        assert isinstance(config, FakeConfig) and config.purpose == purpose
        for hint in (FakeConfig("dispatch", 2), FakeConfig("combine", 2)):
            room = hint.get_nvl_buffer_size_hint(x.shape[1] * 2, self.group.size())
            assert self.num_nvl_bytes >= room, "no room in the buffer"

    def _check_handle(self, handle):
        assert any(handle is own for own in self.handles), "a handle of another buffer, or changed"

    def _finish(self, outputs, previous_event, async_finish, allocate_on_comm_stream):
        assert previous_event is None or isinstance(previous_event, FakeEvent)
        if allocate_on_comm_stream:
            assert previous_event is not None and async_finish
        if not async_finish:
            return FakeEvent()
        pending = []
        for i, value in enumerate(outputs):
            outputs[i] = torch.full_like(value, True if value.dtype == torch.bool else NOT_YET)
            pending.append((outputs[i], value))
        return FakeEvent("comm stream", pending)


class FakeHybridEPBuffer:
    """`deep_ep.HybridEPBuffer`."""

    made: list[tuple] = []

    def __init__(
        self,
        group,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int = None,
        num_sms_combine_api: int = None,
        num_sms_preprocessing_api: int = None,
        num_blocks_permute: int = None,
        num_blocks_unpermute: int = None,
    ):
        assert len(set(exchange((hidden_dim, max_num_of_tokens_per_rank), group))) == 1
        self.group, self.hidden_dim, self.num_local_experts = group, hidden_dim, num_local_experts
        self.num_sms = (num_sms_dispatch_api, num_sms_combine_api)
        self.handles, self.calls = [], []
        FakeHybridEPBuffer.made.append((self.num_sms, self.calls))

    def dispatch_with_permute(
        self,
        *,
        hidden,
        topk_idx=None,
        topk_weights=None,
        num_of_experts_per_rank=None,
        num_of_experts=None,
        use_fp8=None,
        routing_map=None,
        probs=None,
        scaling_factor=None,
        num_permuted_tokens=None,
        pad_multiple=None,
        handle=None,
        non_blocking=False,
        fuse_permute_dispatch=False,
    ):
        assert hidden.dim() == 2 and hidden.is_contiguous() and hidden.shape[1] == self.hidden_dim
        tokens = exchange(hidden.shape[0], self.group)
        assert len(set(tokens)) == 1 and tokens[0] > 0 and tokens[0] % 16 == 0
        rank, here = self.group.rank(), self.num_local_experts
        again = handle is not None
        self.calls.append("dispatch again" if again else "dispatch")
        if again:
            assert routing_map is None and probs is None
            self._check_handle(handle, pad_multiple, fuse_permute_dispatch)
            rows, padded = handle[0], handle[1]
            assert type(num_permuted_tokens) is int and num_permuted_tokens == sum(padded)
        else:
            assert routing_map.dtype == torch.bool
            assert routing_map.shape == (hidden.shape[0], here * self.group.size())
            assert probs.shape == routing_map.shape and num_of_experts_per_rank == here
            check_weights(probs, hidden)
            maps = torch.cat(exchange(routing_map, self.group))[:, rank * here : (rank + 1) * here]
            # Rows of each local expert: a token among those of all ranks, -1 to fill up.
            rows, padded = [], []
            for expert in range(here):
                tokens_of = maps[:, expert].nonzero().squeeze(1)
                filler = -len(tokens_of) % pad_multiple
                rows.append(torch.cat((tokens_of, tokens_of.new_full((filler,), -1))))
                padded.append(len(rows[-1]))
            handle = (rows, padded, (pad_multiple, fuse_permute_dispatch), hidden.shape[0])
            self.handles.append(handle)
        everyone = torch.cat(exchange(hidden, self.group))
        everyone = torch.cat((everyone, everyone.new_zeros(1, hidden.shape[1])))
        recv = everyone[torch.cat(rows)]
        weights = None
        if probs is not None:
            all_probs = torch.cat(exchange(probs, self.group))
            all_probs = torch.cat((all_probs, all_probs.new_zeros(1, probs.shape[1])))
            weights = torch.cat([all_probs[r, rank * here + e] for e, r in enumerate(rows)])
        return recv, weights, None, torch.tensor(padded, dtype=torch.int32), handle

    def combine_with_unpermute(
        self,
        *,
        hidden,
        probs=None,
        handle=None,
        pad_multiple=None,
        fuse_unpermute_combine=False,
    ):
        self._check_handle(handle, pad_multiple, fuse_unpermute_combine)
        self.calls.append("combine")
        rows, padded, _, tokens = handle
        ranks, rank, here = self.group.size(), self.group.rank(), self.num_local_experts
        assert hidden.shape == (sum(padded), self.hidden_dim) and hidden.is_contiguous()
        total = hidden.new_zeros(ranks * tokens, self.hidden_dim)
        for row, token in zip(hidden, torch.cat(rows), strict=True):
            if token >= 0:
                total[token] += row
        combined = sum(exchange(total, self.group))[rank * tokens : (rank + 1) * tokens]
        if probs is None:
            return combined, None
        check_weights(probs, hidden)
        assert probs.shape == (sum(padded),) and probs.is_contiguous()
        total = probs.new_zeros(ranks * tokens, ranks * here)
        for expert, (values, tokens_of) in enumerate(
            zip(probs.split(padded), rows, strict=True), start=rank * here
        ):
            total[tokens_of[tokens_of >= 0], expert] = values[tokens_of >= 0]
        return combined, sum(exchange(total, self.group))[rank * tokens : (rank + 1) * tokens]

    def _check_handle(self, handle, pad_multiple, fused):
        assert any(handle is own for own in self.handles), "a handle of another buffer, or changed"
        assert handle[2] == (pad_multiple, fused)


class FakeHybridEPBufferWithoutFusion(FakeHybridEPBuffer):
    """An earlier release."""

    def dispatch_with_permute(self, *, hidden, routing_map=None, probs=None):
        raise AssertionError("not reached")
