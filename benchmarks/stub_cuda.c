/* A libcuda whose every call succeeds and does nothing: Triton's real launch path runs over it, so
 * that the host time of a launch can be measured on a machine without a GPU. */
#include <stdint.h>
#include <string.h>

#include "cuda.h"

#define STUB(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

STUB(cuInit, unsigned flags)
STUB(cuCtxSetCurrent, CUcontext context)
STUB(cuCtxSetLimit, CUlimit limit, size_t value)
STUB(cuModuleUnload, CUmodule module)
STUB(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
STUB(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)

CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  return *module = (CUmodule)2, CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static uintptr_t handles;
  return *function = (CUfunction)++handles, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  return *text = "stub", CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *launch) {
  return *count = 1, CUDA_SUCCESS;
}
/* An H100. */
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    default: *value = 65536;
  }
  return CUDA_SUCCESS;
}
/* A map begins with a word that depends on everything it was made from. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *base, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint32_t word = (uint32_t)(uintptr_t)base ^ (type * 31 + swizzle * 37 + fill * 41);
  for (cuuint32_t i = 0; i < rank; i++) word = word * 33 ^ (uint32_t)(sizes[i] + 43 * box[i]);
  for (cuuint32_t i = 0; i + 1 < rank; i++) word = word * 33 ^ (uint32_t)strides[i];
  memset(map, 0, sizeof *map);
  memcpy(map, &word, sizeof word);
  return CUDA_SUCCESS;
}

/* What the first launches were given; of parameters, of which the reader says how many there are,
 * the lower halves: enough to tell them apart. */
enum { LAUNCHES = 16, WORDS = 64 };
struct launch {
  uint32_t function, grid[3], block, shared, attributes, words[WORDS];
};
struct launch stub_launches[LAUNCHES];
unsigned stub_launched, stub_parameters[LAUNCHES];

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments,
                          void **extra) {
  unsigned at = stub_launched++;
  if (at >= LAUNCHES) return CUDA_SUCCESS;
  struct launch *launch = &stub_launches[at];
  *launch = (struct launch){(uint32_t)(uintptr_t)function,
                            {config->gridDimX, config->gridDimY, config->gridDimZ},
                            config->blockDimX, config->sharedMemBytes, config->numAttrs};
  for (unsigned i = 0; i < stub_parameters[at]; i++) memcpy(&launch->words[i], arguments[i], 4);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments,
                        void **extra) {
  CUlaunchConfig config = {.gridDimX = gx, .gridDimY = gy, .gridDimZ = gz, .blockDimX = bx,
                           .sharedMemBytes = shared};
  return cuLaunchKernelEx(&config, function, arguments, extra);
}
