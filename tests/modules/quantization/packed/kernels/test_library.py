"""Loading the library: its OpenMP is the one that is in the process, in whichever file PyTorch brings it."""

import ctypes
import sys

import pytest

from fairseq.modules.quantization.packed.kernels import library


@pytest.mark.skipif(sys.platform != "linux" or not library.load(), reason="only on Linux, with the library")
@pytest.mark.parametrize(
    "mapped", ["/an env/torch.libs/libgomp-a49a47f9.so.1.0.0", "/libgomp.so.1", "/libomp.so", None]
)
def test_openmp_that_torch_keeps_to_itself_is_made_visible(monkeypatch, tmp_path, mapped):
    maps = tmp_path / "maps"
    files = ("", "/lib/libc.so.6", "/lib/libcomplex.so", mapped or "[heap]")
    maps.write_text("\n".join(f"7f00-7f01 r-xp 00000000 fe:00 1234    {file}" for file in files))
    opened, real = [], ctypes.CDLL

    def loader(name, mode=ctypes.DEFAULT_MODE):
        if name != str(library._file()):
            return opened.append((name, mode))
        if not opened:
            raise OSError(f"{name}: undefined symbol: omp_get_thread_num")
        return real(name)

    monkeypatch.setattr(library, "MAPS", maps)
    monkeypatch.setattr(ctypes, "CDLL", loader)
    assert library._open().fairseq_level_name(1) == b"portable"
    assert opened == [(mapped or "libgomp.so.1", ctypes.RTLD_GLOBAL)]
