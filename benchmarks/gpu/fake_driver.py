"""A CUDA driver that does nothing: what a launch costs the host, measured where there is no GPU.

``install()`` compiles a ``libcuda.so.1`` whose functions return at once and makes it Triton's driver. From
then on this process compiles kernels for sm_90 and launches them, on CPU tensors, by the very code that
launches them on a GPU: Triton's, from Python down to ``cuLaunchKernelEx``. Nothing is computed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARCHITECTURE = 90

#: Called as ``watch(function, grid, parameters)`` at each launch, where one is set.
Watch = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
)

SOURCE = r"""
#include "cuda.h"
#define DOES_NOTHING(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
static char things[65536];
static unsigned made;
unsigned long long launches;
void (*watch)(void *, unsigned *, void **);
static CUresult context(CUcontext *c) { *c = (CUcontext)things; return CUDA_SUCCESS; }
DOES_NOTHING(cuInit, unsigned flags)
DOES_NOTHING(cuCtxSetCurrent, CUcontext c)
DOES_NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
DOES_NOTHING(cuModuleUnload, CUmodule module)
DOES_NOTHING(cuFuncSetAttribute, CUfunction f, CUfunction_attribute attribute, int value)
DOES_NOTHING(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache config)
CUresult cuCtxGetCurrent(CUcontext *c) { return context(c); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return context(c); }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int ordinal) { *d = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice d) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 132;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)(things + ++made % sizeof things);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) { *text = ""; return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction f, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
/* The host's memory is the device's. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p) {
  *(CUdeviceptr *)value = p;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *which, void **values, CUdeviceptr p) {
  for (unsigned k = 0; k < n; k++) *(CUdeviceptr *)values[k] = p;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  launches++;
  if (watch) {
    unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    watch(f, grid, parameters);
  }
  return CUDA_SUCCESS;
}
"""


def install(folder: Path) -> Any:
    """Make the driver Triton's, its library compiled into ``folder``; return that library.

    Triton must not have been imported under TRITON_INTERPRET, nor have launched anything.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    library = _built(folder, Path(nvidia.__file__).parent / "include")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    # Triton's own modules find it by its name, once it has been loaded.
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]
        """Of one GPU and one stream."""

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_current_device: Callable[[], int] = lambda: 0
            self.get_current_stream: Callable[[int], int] = lambda device: 0
            self.get_device_capability = lambda device: divmod(ARCHITECTURE, 10)
            self.set_current_device = lambda device: None

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", ARCHITECTURE, 32)

    triton.runtime.driver.set_active(Driver())
    return loaded


def _built(folder: Path, include: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    if not library.exists() or not source.exists() or source.read_text() != SOURCE:
        source.write_text(SOURCE)
        command = ["gcc", "-shared", "-fPIC", "-O2", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library
