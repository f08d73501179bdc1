/* A stand-in for the CUDA driver, as far as Triton asks it anything: one device, which runs nothing. Every
   launch is handed to the function that stand_in_record was given. cuda.h is that of Triton's wheel. */

#include "cuda.h"
#include <stdlib.h>
#include <string.h>

/* grid and block, 3 each, and bytes of dynamic shared memory; the addresses of the parameters. */
typedef void (*recorder_t)(CUfunction function, CUstream stream, const unsigned *numbers, void **parameters);
static recorder_t recorder;

void stand_in_record(recorder_t given) { recorder = given; }

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                        void **extra) {
  const unsigned numbers[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared};
  if (!recorder || !parameters || extra)
    return CUDA_ERROR_NOT_SUPPORTED;
  recorder(function, stream, numbers, parameters);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  if (c->numAttrs)
    return CUDA_ERROR_NOT_SUPPORTED; /* clusters, cooperative launches: none of ours */
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, parameters, extra);
}

/* A module is its code, a function a block of memory of its own: handles, which nobody looks into. */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = malloc(1);
  return CUDA_SUCCESS;
}

/* Tensors are in the CPU's memory: a pointer is what it is. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_NOT_SUPPORTED;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

/* An A100. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 8; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 163 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 164 * 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

/* There is one context. */
static CUcontext context = (CUcontext)&recorder;
CUresult cuCtxGetCurrent(CUcontext *current) { return *current = context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice device) { return *current = context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **words) { return *words = "the stand-in", CUDA_SUCCESS; }

/* What Triton links against and these kernels have no use for. */
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
