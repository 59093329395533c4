"""What the model of an epoch is made of: hardware, architecture, workload, and everything that is assumed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One GPU, or all cores of a machine.

    Attributes:
        name: What it is called.
        flops: Dense matrix products in the dtype that is used, floating-point operations a second, at most.
        bandwidth: Memory bandwidth, bytes a second, at most.
        memory: Bytes.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float


H100 = Accelerator("H100 SXM", 989e12, 3.35e12, 80e9)
"""NVIDIA H100 Tensor Core GPU data sheet: bfloat16 without sparsity (1,979 TFLOP/s with), HBM3."""

A100 = Accelerator("A100 80GB SXM", 312e12, 2.0e12, 80e9)
"""NVIDIA A100 Tensor Core GPU data sheet: bfloat16 without sparsity, HBM2e (2,039 GB/s)."""

INFINIBAND = 50e9
"""Bytes a second of one port of NVIDIA Quantum-2 InfiniBand NDR, 400 Gb/s."""

NVLINK = 450e9
"""Bytes a second from one H100 to the others over NVLink 4: 900 GB/s in both directions together."""

PCIE = 64e9
"""Bytes a second in one direction of PCIe 5.0 with 16 lanes."""


@dataclass(frozen=True)
class Architecture:
    """A Llama-like model: grouped-query attention and three matrices in each layer's feed-forward part.

    Attributes:
        name: What it is called.
        layers: Layers.
        hidden: Width.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_size: Width of a head.
        intermediate: Width of the feed-forward part.
        vocabulary: Tokens.
        tied: Whether embedding and output head are one matrix.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def linear(self) -> int:
        """Weights of all layers' matrices, which every token is multiplied with."""
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights; those of the norms and biases are left out."""
        return self.linear + self.head * (1 if self.tied else 2)

    def cache_bytes(self, dtype_bytes: int = 2) -> int:
        """Keys and values of one token in all layers, bytes."""
        return 2 * self.layers * self.kv_heads * self.head_size * dtype_bytes

    def adapter_parameters(self, rank: int) -> int:
        """Weights of a LoRA adapter on all seven projections: ``rank (in + out)`` each."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = 2 * (self.hidden + q) + 2 * (self.hidden + kv)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))


QWEN_7B = Architecture("Qwen2.5-7B", 28, 3584, 28, 4, 128, 18944, 152064, tied=False)
QWEN_1_5B = Architecture("Qwen2.5-1.5B", 28, 1536, 12, 2, 128, 8960, 151936, tied=True)
SMOLLM_135M = Architecture("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, tied=True)


@dataclass(frozen=True)
class Workload:
    """One epoch: one rollout, trained on once.

    Attributes:
        prompts: Groups.
        samples: Episodes of each, of one turn.
        prompt_tokens: Length of a prompt.
        completion_tokens: Mean length of a completion.
        longest: Length of the longest.
        updates: Optimizer steps.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    completion_tokens: float
    longest: int
    updates: int = 1

    @property
    def sequences(self) -> int:
        """Episodes."""
        return self.prompts * self.samples

    @property
    def sampled_tokens(self) -> float:
        """Tokens of the policy."""
        return self.sequences * self.completion_tokens

    @property
    def input_tokens(self) -> float:
        """Tokens that training computes, each prompt once."""
        return self.prompts * self.prompt_tokens + self.sampled_tokens

    @property
    def pairs(self) -> float:
        """Pairs of a token and one that it sees: attention's quadratic part."""
        p, c = self.prompt_tokens, self.completion_tokens
        return self.prompts * (p * p / 2 + self.samples * (c * p + c * c / 2))


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Attributes:
        trainers: Training processes, one accelerator each.
        servers: Engines, one accelerator each.
        accelerator: What all of them are.
        colocated: Whether the engines are on the trainers' accelerators, so that one waits for the other.
        gradient_link: Bytes a second from one trainer to the others.
        storage: Bytes a second of the folder that publishes adapters, all readers together.
        host_link: Bytes a second between the host's memory and one accelerator, for sleep mode.
    """

    trainers: int
    servers: int
    accelerator: Accelerator
    colocated: bool = False
    gradient_link: float = NVLINK
    storage: float = 5e9
    host_link: float = PCIE


@dataclass(frozen=True)
class HostCosts:
    """What the first process's own Python takes, seconds of one processor core; measured where it says so.

    Attributes:
        episode: Collector, an episode of one turn.
        sampled_token: Collector, a sampled token.
        packed_token: Packing, a token of a sequence with its prompt.
        handed_token: Pickling a packed token for another process and unpickling it there.
    """

    episode: float
    sampled_token: float
    packed_token: float
    handed_token: float


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. None of it was measured on a GPU.

    Attributes:
        train_share: Useful operations of a training step over the accelerator's peak (MFU).
        prefill_share: The same of prefill.
        decode_share: The same of decoding where operations bound it.
        bandwidth_share: Bytes read in decoding over the peak bandwidth.
        link_share: Bytes moved over a link's peak.
        balance: Tokens of the mean process over those of the fullest: packing evens them out.
        adapter_cost: Factor on decoding and prefill for the LoRA adapter.
        checkpointing: Whether layers are computed again in the backward pass.
        prompts_shared: Whether the samples of a group are on one engine and share what it has cached of their prompt.
        block: Tokens of a cache block; only whole blocks are shared, and never a prompt's last token.
        batch: Most sequences that an engine decodes at once.
        memory_share: Share of an accelerator's memory for the engine's weights and cache.
        dtype_bytes: Of weights and cache.
        rank: Of the adapter, which is published in float32.
        load: Seconds of an engine to take an adapter that it has read.
        scores: Whether the trainer computes the rollout's log-probabilities before it trains.
        sleeps: Whether colocated engines give their memory back while there is training.
    """

    train_share: float = 0.4
    prefill_share: float = 0.5
    decode_share: float = 0.5
    bandwidth_share: float = 0.6
    link_share: float = 0.7
    balance: float = 0.95
    adapter_cost: float = 1.15
    checkpointing: bool = True
    prompts_shared: bool = True
    block: int = 16
    batch: int = 256
    memory_share: float = 0.9
    dtype_bytes: int = 2
    rank: int = 16
    load: float = 0.15
    scores: bool = False
    sleeps: bool = True


IDEAL = Assumptions(
    train_share=1.0,
    prefill_share=1.0,
    decode_share=1.0,
    bandwidth_share=1.0,
    link_share=1.0,
    balance=1.0,
    adapter_cost=1.0,
    checkpointing=False,
)
"""Every share 1: no epoch could be faster."""
