"""Kernels by name, and how they are recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from samq.engines import kernels
from samq.engines.kernels import ATTENTION, DEQUANTIZE, OTHER, SOFTMAX, Kernel, Launched, by_kind, trace
from samq.errors import BadInput, MachineLacks


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize256x128x32_cgasize1x2x1_execute_kernel_trt", "FP16 GEMM"),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize64x96x32_stage3_execute_kernel_trt", "FP16 GEMM"),
        ("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64_stage4_warpsize2x2x1_tensor16x8x32", "INT8 GEMM"),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32", "INT8 GEMM"),
        ("sm80_xmma_fprop_implicit_gemm_indexed_wo_smem_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize", "FP16 GEMM"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4_warpsize2x2x1", "TF32 GEMM"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize64x64x8_stage3_warpsize1x4x1_ffma", "FP32 GEMM"),
        ("sm90_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize128x128x128_cgasize1x2x1_warpgroupsize1x1x1", "INT8 GEMM"),
        ("sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x64_stage3_warpsize2x2x1", "FP8 GEMM"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1", "BF16 GEMM"),
        ("nvjet_sm90_hsh_224x64_64x5_1x2_h_bz_NNN", "FP16 GEMM"),
        ("nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_TNT", "FP8 GEMM"),
        ("nvjet_sm100_ootst_128x128_128x6_1x2_h_bz_Avec16UE4M3_Bvec16UE4M3_TNT", "FP4 GEMM"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN", "BF16 GEMM"),
        ("ampere_h16816gemm_128x128_ldg8_stages_64x3_tn", "FP16 GEMM"),
        ("ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_64x3_nn", "FP16 GEMM"),
        ("ampere_bf16_s16816gemm_bf16_64x64_ldg8_f2f_stages_64x5_tn", "BF16 GEMM"),
        (
            "_ZN7cutlass7Kernel2I52cutlass_80_tensorop_f16_s16816gemm_f16_64x64_32x6_nn_align8EEvNT_6ParamsE",
            "FP16 GEMM",
        ),
        ("_ZN7cutlass7Kernel2I51cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16EEvNT_6ParamsE", "INT8 GEMM"),
        ("ampere_sgemm_128x64_nn", "FP32 GEMM"),
        ("turing_fp16_s1688gemm_fp16_128x128_ldg8_f2f_tn", "FP16 GEMM"),
        ("turing_s1688gemm_fp16_256x128_ldg8_f2f_nn", "FP16 GEMM"),
        ("cutlass_75_tensorop_f16_s1688gemm_f16_128x128_32x2_nn_align8", "FP16 GEMM"),
        ("ampere_s16816gemm_fp16_128x128_ldg8_stages_32x5_tn", "FP16 GEMM"),
        ("volta_hgemm_128x64_nn", "FP16 GEMM"),
        ("cutlass3x_sm90_tensorop_s64x128x16gemm_f16_f16_f32_void_f16_128x128x64", "FP16 GEMM"),
        ("cutlass3x_sm90_tensorop_i64x128x32gemm_s8_s8_s32_s8_s8_128x128x128", "INT8 GEMM"),
        ("cutlass_80_tensorop_s1688gemm_128x128_16x4_nn_align4", "TF32 GEMM"),
        ("cutlass_tensorop_f16_s16816fprop_optimized_f16_128x128_32x5_nhwc_align8", "FP16 GEMM"),
        ("ampere_scudnn_128x64_relu_medium_nn_v1", "FP32 GEMM"),
        ("_ZN8internal5gemvx6kernelIii6__halfS2_S2_fLb0ELb1ELb1ELb0ELi7ELb0E", "FP16 GEMM"),
        ("_ZN11onnxruntime7contrib4cuda20MatMulFloatInt4KernelI6__halfLi128ELb0EEEvPT_PKS4_PKhS7_", "unknown GEMM"),
        ("mha11", ATTENTION),
        ("fmha_v2_flash_attention_fp16_64_256_S_128_sm90_kernel_nl", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", ATTENTION),
        ("__myl_bb0_156_CasResCasMaxSubExpSum", SOFTMAX),
        ("_ZN11onnxruntime4cuda20softmax_warp_forwardI6__halfS2_fLi9ELb0EEEvPT0_PKT_iii", SOFTMAX),
        ("_ZN11onnxruntime7contrib4cuda21Dequantize4BitsKernelI6__halfhEEvPT_PKhPKS4_PKT0_iiii", DEQUANTIZE),
        ("_ZN11onnxruntime7contrib4cuda21Dequantize8BitsKernelI6__halfhEEvPT_PKhPKS4_PKT0_iiii", DEQUANTIZE),
        ("_ZN11onnxruntime7contrib22attention_softmax_cuda12SoftmaxSmallI6__halfLj256EEEviiPKT_PS4_", SOFTMAX),
        ("_ZN8gemmHalf6kernelE", "unknown GEMM"),
        ("__myl_bb0_89_DivCasErfCasAddMulMul", OTHER),
        ("_ZN5cudnn19engines_precompiled16nchwToNhwcKernelI6__halfS2_fLb0ELb1EEEvPKT_PT0_", OTHER),
        ("sm50_xmma_pooling_fw_4d_FP16FP32NCHW_Max_execute_kernel_trt", OTHER),
        ("void convertTensor_kernel<__half, float>", OTHER),
        ("_ZN11onnxruntime4cuda17ConversionKernelI6__halffEEvPKT_PT0_l", OTHER),
    ],
)
def test_a_name_tells_the_kind(name: str, kind: str) -> None:
    assert Kernel(name, 1, 1.0).kind == kind


def test_kinds_are_summed_longest_first() -> None:
    found = by_kind([Kernel("mha0", 2, 4.0), Kernel("nvjet_hsh_1", 1, 0.26), Kernel("nvjet_hsh_2", 3, 9.0)])
    assert found == {"FP16 GEMM": Launched(4, 9.3), ATTENTION: Launched(2, 4.0)}
    assert list(found) == ["FP16 GEMM", ATTENTION]


class Refusal(Exception):
    """As `cuptiError` of cupti-python, an Exception and nothing more."""


Refusal.__module__ = "cupti.cupti"


@dataclass
class Cupti:
    """CUPTI without a GPU: it records what `launch` is told while it is enabled, and hands it over when flushed.

    Attributes:
        refuses: names of functions that fail.
    """

    refuses: tuple[str, ...] = ()
    enabled: bool = False

    def __post_init__(self) -> None:
        self.ActivityKind = SimpleNamespace(CONCURRENT_KERNEL=10, MEMCPY=1)
        self._pending: list[Any] = []

    def launch(self, name: str, nanoseconds: int, kind: int = 10) -> None:
        if self.enabled:
            self._pending.append(SimpleNamespace(kind=kind, name=name, start=1000, end=1000 + nanoseconds))

    def activity_register_callbacks(
        self, requested: Callable[[], tuple[int, int]], completed: Callable[[Iterable[Any]], None]
    ) -> None:
        self._may("register")
        assert requested() == (kernels.BUFFER_BYTES, 0)
        self._completed = completed

    def activity_enable(self, kind: int) -> None:
        self._may("enable")
        assert kind == self.ActivityKind.CONCURRENT_KERNEL
        self.enabled = True

    def activity_disable(self, kind: int) -> None:
        self.enabled = False

    def activity_flush_all(self, flag: int) -> None:
        self._completed(self._pending)
        self._pending = []

    def _may(self, step: str) -> None:
        if step in self.refuses:
            raise Refusal("CUPTI_ERROR_NOT_INITIALIZED\nat length")


@pytest.fixture
def cupti(monkeypatch: pytest.MonkeyPatch) -> Cupti:
    stand_in = Cupti()
    package, module = ModuleType("cupti"), ModuleType("cupti.cupti")
    for name in ("activity_register_callbacks", "activity_enable", "activity_disable", "activity_flush_all"):
        setattr(module, name, getattr(stand_in, name))
    module.ActivityKind = stand_in.ActivityKind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupti", package)
    monkeypatch.setitem(sys.modules, "cupti.cupti", module)
    kernels._cupti.cache_clear()
    monkeypatch.setattr(kernels, "_RECORDS", [])
    return stand_in


@pytest.fixture(autouse=True)
def _fresh() -> Iterable[None]:
    yield
    kernels._cupti.cache_clear()


def test_launches_of_a_run_are_recorded_and_no_others(cupti: Cupti) -> None:
    def run() -> None:
        cupti.launch("mha0", 2000)
        cupti.launch("copy", 9000, kind=1)
        cupti.launch("mha0", 1000)
        cupti.launch("nvjet_hsh", 5000)

    cupti.launch("before", 1)
    expected = (Kernel("nvjet_hsh", 1, 5.0), Kernel("mha0", 2, 3.0))
    assert trace(run) == expected
    cupti.launch("between", 1)
    assert trace(run) == expected


def test_what_a_run_raises_comes_through_and_recording_ends(cupti: Cupti) -> None:
    def fails() -> None:
        cupti.launch("of no run that ended", 1)
        raise BadInput("no such input")

    def breaks() -> None:
        raise RuntimeError("of another library")

    with pytest.raises(BadInput, match="no such input"):
        trace(fails)
    with pytest.raises(RuntimeError, match="of another library"):
        trace(breaks)
    assert not cupti.enabled
    assert trace(lambda: cupti.launch("mha0", 1000)) == (Kernel("mha0", 1, 1.0),)


@pytest.mark.parametrize("step", ["register", "enable"])
def test_a_cupti_that_refuses_is_one_line(cupti: Cupti, step: str) -> None:
    cupti.refuses = (step,)
    with pytest.raises(MachineLacks, match=r"CUPTI refuses \(CUPTI_ERROR_NOT_INITIALIZED\); see whether") as told:
        trace(lambda: None)
    assert "\n" not in str(told.value)


def test_without_cupti_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupti.cupti", None)
    kernels._cupti.cache_clear()
    with pytest.raises(MachineLacks, match=r"cupti-python does not load \(.*\); .*`pip install cupti-python`"):
        trace(lambda: None)
