// MaskedGeglu of the domain bakeout for ONNX Runtime: on the CPU, and with BAKEOUT_CUDA on an NVIDIA GPU.
//
// Version 17 of the interface is the first with KernelContext_ParallelFor, and with shape inference.

#include <algorithm>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef BAKEOUT_CUDA
#include <cuda_runtime_api.h>
#endif

#include "bakeout_kernels.h"
#include "masked_geglu_cpu.h"
#include "onnxruntime_abi.h"

namespace {

constexpr uint32_t kVersion = 17;
// Values that a thread takes at a time: some tens of microseconds, far more than handing them over takes.
constexpr int64_t kBlock = 32768;

enum Input { kProj, kMask, kValue, kInputs };

using Dims = std::vector<int64_t>;

// What ONNX Runtime says on its way to where it is returned to it.
struct Failure {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status != nullptr) throw Failure{status};
}

// The status of some work: no exception may leave a function that ONNX Runtime calls.
template <typename Work>
OrtStatus* status_of(const OrtApi* api, Work work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::invalid_argument& error) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api->CreateStatus(ORT_FAIL, "MaskedGeglu failed");
  }
}

using Info = std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)>;

Dims dims_of(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info) {
  size_t count = 0;
  check(api->GetDimensionsCount(info, &count));
  Dims dims(count);
  check(api->GetDimensions(info, dims.data(), count));
  return dims;
}

Dims dims_of(const OrtApi* api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api->GetTensorTypeAndShape(value, &info));
  const Info owned(info, api->ReleaseTensorTypeAndShapeInfo);
  return dims_of(api, info);
}

template <typename Type>
Type* data_of(const OrtApi* api, const OrtValue* value) {
  void* data = nullptr;
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return static_cast<Type*>(data);
}

std::string text_of(const Dims& dims) {
  std::string text = "[";
  for (size_t axis = 0; axis < dims.size(); ++axis) text += (axis ? ", " : "") + std::to_string(dims[axis]);
  return text + "]";
}

int64_t product(Dims::const_iterator begin, Dims::const_iterator end) {
  int64_t result = 1;
  for (; begin != end; ++begin)
    if (__builtin_mul_overflow(result, *begin, &result)) throw std::invalid_argument("a tensor is too large for MaskedGeglu");
  return result;
}

// The sizes of a call: proj [batch, tokens, 2 * width], mask and value [tokens, width]; tokens is 1 where they are [width].
struct Sizes {
  int64_t batch;
  int64_t tokens;
  int64_t width;
  Dims out;
};

// Raises what `check_masked_geglu` of kernels/reference.py raises.
Sizes sizes_of(const Dims& proj, const Dims& mask, const Dims& value) {
  if ((value.size() != 1 && value.size() != 2) || mask != value)
    throw std::invalid_argument("the mask of MaskedGeglu is " + text_of(mask) + " and the value " + text_of(value) +
                                ", not both [N, h] or both [h]");
  const bool by_token = value.size() == 2;
  Dims end = value;
  if (__builtin_mul_overflow(end.back(), 2, &end.back()) || proj.size() < end.size() ||
      !std::equal(end.begin(), end.end(), proj.end() - end.size()))
    throw std::invalid_argument("proj of MaskedGeglu is " + text_of(proj) + ", which does not end in " +
                                (by_token ? "[N, 2h]" : "[2h]") + " for a value of " + text_of(value));
  Sizes sizes = {product(proj.begin(), proj.end() - end.size()), by_token ? value.front() : 1, value.back(), proj};
  sizes.out.back() = sizes.width;
  product(proj.begin(), proj.end() - 1);
  return sizes;
}

std::vector<uint8_t> packed(const uint8_t* mask, const Dims& dims) {
  const int64_t width = dims.back();
  const int64_t rows = product(dims.begin(), dims.end() - 1);
  std::vector<uint8_t> bits(static_cast<size_t>(rows) * ((width + 7) / 8));
  bakeout_pack_mask(mask, bits.data(), rows, width);
  return bits;
}

// The tensors of one call, checked, and the output's place.
struct Call {
  Sizes sizes;
  const void* proj;
  const uint8_t* mask;
  const void* value;
  void* out;

  Call(const OrtApi* api, OrtKernelContext* context) {
    const OrtValue* inputs[kInputs];
    for (size_t index = 0; index < kInputs; ++index) check(api->KernelContext_GetInput(context, index, &inputs[index]));
    sizes = sizes_of(dims_of(api, inputs[kProj]), dims_of(api, inputs[kMask]), dims_of(api, inputs[kValue]));
    OrtValue* output = nullptr;
    check(api->KernelContext_GetOutput(context, 0, sizes.out.data(), sizes.out.size(), &output));
    proj = data_of<const void>(api, inputs[kProj]);
    mask = data_of<const uint8_t>(api, inputs[kMask]);
    value = data_of<const void>(api, inputs[kValue]);
    out = data_of<void>(api, output);
  }
};

// The mask where it is a constant of the graph, else nullptr.
const OrtValue* constant_mask(const OrtApi* api, const OrtKernelInfo* info) {
  int is_constant = 0;
  const OrtValue* mask = nullptr;
  check(api->KernelInfoGetConstantInput_tensor(info, kMask, &is_constant, &mask));
  // What is no vector or matrix is refused when it is called with.
  return is_constant && !dims_of(api, mask).empty() ? mask : nullptr;
}

struct Kernel {
  explicit Kernel(const OrtApi* api) : api(api) {}
  virtual ~Kernel() = default;
  virtual void compute(OrtKernelContext* context) const = 0;

  const OrtApi* const api;
};

template <typename Stored>
using CpuFunction = void (*)(const Stored*, const uint8_t*, const Stored*, Stored*, int64_t, int64_t, int64_t, int64_t, int);

template <typename Stored, CpuFunction<Stored> function>
class CpuKernel : public Kernel {
 public:
  CpuKernel(const OrtApi* api, const OrtKernelInfo* info) : Kernel(api) {
    if (const OrtValue* mask = constant_mask(api, info)) {
      constant_ = true;
      bits_ = packed(data_of<const uint8_t>(api, mask), dims_of(api, mask));
    }
  }

  void compute(OrtKernelContext* context) const override {
    const Call call(api, context);
    const Sizes& sizes = call.sizes;
    const int64_t rows = sizes.batch * sizes.tokens;
    if (rows == 0 || sizes.width == 0) return;
    const Dims patch = {sizes.tokens, sizes.width};
    const std::vector<uint8_t> own = constant_ ? std::vector<uint8_t>() : packed(call.mask, patch);
    const int64_t step = std::max<int64_t>(1, kBlock / sizes.width);
    Blocks blocks = {call, (constant_ ? bits_ : own).data(), rows, step};
    const size_t total = static_cast<size_t>((rows - 1) / step + 1);
    check(api->KernelContext_ParallelFor(context, Blocks::run, total, 0, &blocks));
  }

 private:
  struct Blocks {
    const Call& call;
    const uint8_t* bits;
    int64_t rows;
    int64_t step;

    static void run(void* data, size_t number) {
      const Blocks& it = *static_cast<const Blocks*>(data);
      const int64_t first = static_cast<int64_t>(number) * it.step;
      function(static_cast<const Stored*>(it.call.proj), it.bits, static_cast<const Stored*>(it.call.value),
               static_cast<Stored*>(it.call.out), it.call.sizes.tokens, it.call.sizes.width, first,
               std::min(it.rows, first + it.step), BAKEOUT_AVX512);
    }
  };

  bool constant_ = false;
  std::vector<uint8_t> bits_;
};

#ifdef BAKEOUT_CUDA
void check_cuda(int error) {
  if (error != 0) throw std::runtime_error(std::string("MaskedGeglu: ") + bakeout_cuda_error(error));
}

// The packed bits of a mask that lies on a GPU or on the host, on the same GPU or the current one.
std::shared_ptr<const void> packed_on_gpu(const void* mask, const Dims& dims) {
  cudaPointerAttributes place;
  int before = 0;
  check_cuda(cudaGetDevice(&before));
  check_cuda(cudaPointerGetAttributes(&place, mask));
  std::vector<uint8_t> host(static_cast<size_t>(product(dims.begin(), dims.end())));
  check_cuda(cudaMemcpy(host.data(), mask, host.size(), cudaMemcpyDefault));
  const std::vector<uint8_t> bits = packed(host.data(), dims);
  void* there = nullptr;
  if (place.type == cudaMemoryTypeDevice) check_cuda(cudaSetDevice(place.device));
  const cudaError_t allocated = cudaMalloc(&there, bits.size());
  const cudaError_t back = cudaSetDevice(before);
  const std::shared_ptr<const void> owned(there, [](void* data) { cudaFree(data); });
  check_cuda(allocated);
  check_cuda(back);
  check_cuda(cudaMemcpy(there, bits.data(), bits.size(), cudaMemcpyDefault));
  return owned;
}

using CudaFunction = decltype(&bakeout_masked_geglu_f32);

template <CudaFunction function>
class CudaKernel : public Kernel {
 public:
  CudaKernel(const OrtApi* api, const OrtKernelInfo* info) : Kernel(api) {
    const OrtValue* mask = constant_mask(api, info);
    if (mask == nullptr) return;
    const Dims dims = dims_of(api, mask);
    if (product(dims.begin(), dims.end()) > 0) bits_ = packed_on_gpu(data_of<const void>(api, mask), dims);
  }

  void compute(OrtKernelContext* context) const override {
    const Call call(api, context);
    auto [batch, tokens, width, dims] = call.sizes;
    if (batch * tokens == 0 || width == 0) return;
    const bool by_token = tokens > 1;
    if (!by_token) std::swap(batch, tokens);
    void* stream = nullptr;
    check(api->KernelContext_GetGPUComputeStream(context, &stream));
    const int64_t mask_stride = bits_ ? (width + 7) / 8 : width;
    check_cuda(function(call.proj, tokens * 2 * width, 2 * width, bits_ ? bits_.get() : call.mask, bits_ != nullptr,
                        by_token ? mask_stride : 0, call.value, by_token ? width : 0, call.out, batch, tokens, width, stream));
  }

 private:
  std::shared_ptr<const void> bits_;
};
#endif

template <typename Made>
Kernel* make(const OrtApi* api, const OrtKernelInfo* info) {
  return new Made(api, info);
}

std::vector<const char*> names_of(const OrtApi* api, const OrtTensorTypeAndShapeInfo* info, size_t count) {
  std::vector<const char*> names(count);
  check(api->GetSymbolicDimensions(info, names.data(), count));
  return names;
}

// The shape of proj, with the width of the value, or half of proj's, at the end. Unknown sizes are -1, or have names.
void infer_shape(const OrtApi* api, const OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* proj = nullptr;  // both stay the context's
  OrtTensorTypeAndShapeInfo* value = nullptr;
  check(api->ShapeInferContext_GetInputTypeShape(context, kProj, &proj));
  check(api->ShapeInferContext_GetInputTypeShape(context, kValue, &value));
  Dims dims = dims_of(api, proj);
  const Dims patch = dims_of(api, value);
  if (dims.empty()) return;  // of any rank
  std::vector<const char*> names = names_of(api, proj, dims.size());
  names.back() = patch.empty() ? "" : names_of(api, value, patch.size()).back();
  dims.back() = !patch.empty() && patch.back() >= 0 ? patch.back() : dims.back() >= 0 ? dims.back() / 2 : -1;
  ONNXTensorElementDataType type;
  check(api->GetTensorElementType(proj, &type));
  OrtTensorTypeAndShapeInfo* out = nullptr;
  check(api->CreateTensorTypeAndShapeInfo(&out));
  const Info owned(out, api->ReleaseTensorTypeAndShapeInfo);
  check(api->SetTensorElementType(out, type));
  check(api->SetDimensions(out, dims.data(), dims.size()));
  check(api->SetSymbolicDimensions(out, names.data(), names.size()));
  check(api->ShapeInferContext_SetOutputTypeShape(context, 0, out));
}

// The operator in one type on one provider.
struct MaskedGeglu : OrtCustomOp {
  const OrtApi* api;
  const char* provider;
  ONNXTensorElementDataType type;
  Kernel* (*create)(const OrtApi*, const OrtKernelInfo*);

  MaskedGeglu(const OrtApi* api, const char* provider, ONNXTensorElementDataType type,
              Kernel* (*create)(const OrtApi*, const OrtKernelInfo*))
      : OrtCustomOp{}, api(api), provider(provider), type(type), create(create) {
    version = kVersion;
    GetName = [](const OrtCustomOp*) { return "MaskedGeglu"; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider; };
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputs; };
    GetInputType = [](const OrtCustomOp* op, size_t index) {
      return index == kMask ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL : self(op).type;
    };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetOutputType = [](const OrtCustomOp* op, size_t) { return self(op).type; };
    GetInputCharacteristic = GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* of, const OrtKernelInfo* info, void** kernel) {
      return status_of(of, [&] { *kernel = self(op).create(self(op).api, info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Kernel& own = *static_cast<const Kernel*>(kernel);
      return status_of(own.api, [&] { own.compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
      return status_of(self(op).api, [&] { infer_shape(self(op).api, context); });
    };
  }

 private:
  static const MaskedGeglu& self(const OrtCustomOp* op) { return *static_cast<const MaskedGeglu*>(op); }
};

// The domain of the operators, which must outlive every session that it is given to: it stays until the library goes.
class Domain {
 public:
  explicit Domain(const OrtApi* api) : api_(api) {
    add("CPUExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, make<CpuKernel<float, bakeout_masked_geglu_cpu_f32>>);
    add("CPUExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        make<CpuKernel<uint16_t, bakeout_masked_geglu_cpu_f16>>);
    add("CPUExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
        make<CpuKernel<uint16_t, bakeout_masked_geglu_cpu_bf16>>);
#ifdef BAKEOUT_CUDA
    add("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, make<CudaKernel<bakeout_masked_geglu_f32>>);
    add("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, make<CudaKernel<bakeout_masked_geglu_f16>>);
    add("CUDAExecutionProvider", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, make<CudaKernel<bakeout_masked_geglu_bf16>>);
#endif
    OrtCustomOpDomain* domain = nullptr;
    check(api->CreateCustomOpDomain("bakeout", &domain));
    domain_ = {domain, api->ReleaseCustomOpDomain};
    for (const auto& op : ops_) check(api->CustomOpDomain_Add(domain, op.get()));
  }

  void add_to(OrtSessionOptions* options) const { check(api_->AddCustomOpDomain(options, domain_.get())); }

 private:
  void add(const char* provider, ONNXTensorElementDataType type, Kernel* (*create)(const OrtApi*, const OrtKernelInfo*)) {
    ops_.push_back(std::make_unique<MaskedGeglu>(api_, provider, type, create));
  }

  const OrtApi* api_;
  std::vector<std::unique_ptr<MaskedGeglu>> ops_;
  std::unique_ptr<OrtCustomOpDomain, void (*)(OrtCustomOpDomain*)> domain_{nullptr, nullptr};
};

}  // namespace

// What ONNX Runtime looks for in a library of custom operators.
BAKEOUT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "bakeout's operators need ONNX Runtime 1.17 or newer");
  return status_of(api, [&] {
    static const Domain domain(api);
    domain.add_to(options);
  });
}
