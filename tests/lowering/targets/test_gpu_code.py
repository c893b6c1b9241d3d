"""Reading PTX and SASS, on code of which every count is known."""

import pytest

from lowering.targets import figures, gpu, triton_ir

SASS = """
.text.forward_kernel:
.L_x_5:
        /*0000*/               IADD3 R0, R1, R2, RZ ;
.L_x_2:
        /*0010*/               HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0020*/               FADD R1, R2, R3 ;
        /*0030*/               HGMMA.64x64x16.F32.BF16 R88, R120, gdesc[UR12], R88 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
.L_x_4:
        /*0050*/               HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0060*/               @P0 BRA `(.L_x_4) ;
.L_x_6:
        /*0070*/               FADD R1, R2, R3 ;
        /*0080*/               @P0 BRA `(.L_x_6) ;
        /*0090*/               @P0 BRA `(.L_x_5) ;
        /*00a0*/               @P0 BRA `(.L_x_7) ;
.L_x_7:
        /*00b0*/               EXIT ;
"""
PTX = ".visible .entry forward_kernel(\nwgmma.mma_async x;\nwgmma.mma_async y;\n"
TOLD = """ptxas info    : Compiling entry function 'forward_kernel' for 'sm_90a'
    0 bytes stack frame, 24 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 243 registers, used 1 barriers"""
THUNKS = (
    "002: kCustomKernel [x] forward_kernel grid: [8, 4, 1] threads: [256, 1, 1]  "
    "shared_memory: 81920 bytes"
)
FILES = {
    "m.3.ptx": PTX,
    "m.3.ptxas": TOLD,
    "m.3.sass": SASS,
    "m.1.ptx": ".visible .entry loop_fusion(\nadd;",
    "m.thunk_sequence.txt": THUNKS,
}


def test_a_kernel():
    (kernel,) = gpu.kernels_of(FILES)
    assert kernel.name == "forward_kernel"
    assert (kernel.registers, kernel.shared_memory) == (243, 81920)
    assert (kernel.spill_stores, kernel.spill_loads) == (24, 36)
    assert kernel.products == {"HGMMA": 3}
    counts = [(loop.instructions, loop.products) for loop in kernel.loops]
    assert counts == [(4, 2), (2, 1)]


def test_its_figures_and_its_code():
    (kernel,) = figures.of_gpu(gpu.kernels_of(FILES))
    assert kernel.figures["wgmma"] == 2
    assert [loop.name for loop in kernel.loops] == ["full tile", "partial tile"]
    lines = kernel.marked(hot=True).splitlines()
    assert len(lines) == 1 + 5 + 3
    assert lines[1].startswith("full tile     | .L_x_2:")
    assert lines[-1].startswith("partial tile  |         /*0060*/")
    assert "| .L_x_5:" in kernel.marked()


def test_ptx_alone():
    only = {name: x for name, x in FILES.items() if name.endswith(".ptx")}
    (kernel,) = figures.of_gpu(gpu.kernels_of(only))
    assert kernel.figures["registers"] is None
    assert (kernel.loops, kernel.code) == ((), PTX)


@pytest.mark.parametrize(
    ("plugin", "found", "message"),
    [
        (False, True, "no PTX, SASS, registers or spills: jax's CUDA plugin is not"),
        (True, False, "ptxas and nvdisasm of CUDA are neither installed nor in PATH"),
        (True, True, ""),
    ],
)
def test_what_is_missing(monkeypatch, plugin, found, message):
    monkeypatch.setattr(gpu, "has_plugin", lambda: plugin)
    monkeypatch.setattr(gpu, "tool", lambda name: name if found else None)
    told = gpu.missing_tools()
    assert told.startswith(message) if found else message in told
    assert not told or "sadsl[gpu-tools]" in told


def test_loops_of_triton_ir():
    code = "\n".join(
        [
            "tt.func @f {",
            "  scf.for %a {",
            "    scf.for %b {",
            "      tt.dot",
            "    }",
            "    scf.for %c {",
            "      arith.addi",
            "    }",
            "  }",
            "}",
        ]
    )
    assert triton_ir.loops(code) == ((2, 4, 1),)
