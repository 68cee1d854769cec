// The few entries of ONNX Runtime's C interface that the operators use. The interface only grows: a function keeps its
// place in the table for all later versions. Its wheel has no headers, so the places stand here; they are those of
// onnxruntime_c_api.h of versions 1.17 to 1.29. The self-test at load calls each of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace internvl_edge::ort {

constexpr uint32_t VERSION = 17;  // the first with ParallelFor

struct Status;
struct Value;
struct ShapeAndType;
struct KernelInfo;
struct KernelContext;
struct Domain;
struct SessionOptions;

enum ErrorCode { FAIL = 1, INVALID_ARGUMENT = 2 };
enum ElementType { FLOAT = 1, INT32 = 6 };
enum Characteristic { REQUIRED = 0 };

struct Base {
    const void* const* (*get_api)(uint32_t version);
    const char* (*version)();
};

// The table of functions. Each returns a status, which is null on success, except those that create or release.
class Api {
public:
    Api() = default;
    explicit Api(const void* const* table) : table_(table) {}
    explicit operator bool() const { return table_ != nullptr; }

    Status* error(ErrorCode code, const char* text) const { return at<Status*(ErrorCode, const char*)>(0)(code, text); }
    Status* create_domain(const char* name, Domain** made) const {
        return at<Status*(const char*, Domain**)>(26)(name, made);
    }
    Status* add_operator(Domain* domain, const void* op) const {
        return at<Status*(Domain*, const void*)>(27)(domain, op);
    }
    Status* add_domain(SessionOptions* options, Domain* domain) const {
        return at<Status*(SessionOptions*, Domain*)>(28)(options, domain);
    }
    Status* data(Value* value, void** found) const { return at<Status*(Value*, void**)>(51)(value, found); }
    Status* dimensions_count(const ShapeAndType* shape, size_t* count) const {
        return at<Status*(const ShapeAndType*, size_t*)>(61)(shape, count);
    }
    Status* dimensions(const ShapeAndType* shape, int64_t* found, size_t count) const {
        return at<Status*(const ShapeAndType*, int64_t*, size_t)>(62)(shape, found, count);
    }
    Status* shape(const Value* value, ShapeAndType** made) const {
        return at<Status*(const Value*, ShapeAndType**)>(65)(value, made);
    }
    Status* attribute(const KernelInfo* info, const char* name, int64_t* found) const {
        return at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, found);
    }
    Status* input(const KernelContext* context, size_t index, const Value** found) const {
        return at<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, found);
    }
    Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t count, Value** made) const {
        return at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, shape, count,
                                                                                       made);
    }
    void release(Status* status) const { at<void(Status*)>(93)(status); }
    void release(ShapeAndType* shape) const { at<void(ShapeAndType*)>(99)(shape); }
    // Call task(data, 0) to task(data, count - 1) on the session's threads.
    Status* parallel_for(const KernelContext* context, void (*task)(void*, size_t), size_t count, void* data) const {
        using Task = void (*)(void*, size_t);
        return at<Status*(const KernelContext*, Task, size_t, size_t, void*)>(274)(context, task, count, 0, data);
    }

private:
    template <class Function>
    Function* at(size_t place) const {
        return reinterpret_cast<Function*>(const_cast<void*>(table_[place]));
    }
    const void* const* table_ = nullptr;
};

// The description of a custom operator. What is null is not used.
struct Operator {
    uint32_t version = VERSION;
    void* (*create)(const Operator*, const void* api, const KernelInfo*) = nullptr;
    const char* (*name)(const Operator*) = nullptr;
    const char* (*provider)(const Operator*) = nullptr;
    ElementType (*input_type)(const Operator*, size_t) = nullptr;
    size_t (*input_count)(const Operator*) = nullptr;
    ElementType (*output_type)(const Operator*, size_t) = nullptr;
    size_t (*output_count)(const Operator*) = nullptr;
    void (*compute)(void*, KernelContext*) = nullptr;
    void (*destroy)(void*) = nullptr;
    Characteristic (*input_characteristic)(const Operator*, size_t) = nullptr;
    Characteristic (*output_characteristic)(const Operator*, size_t) = nullptr;
    int (*input_memory)(const Operator*, size_t) = nullptr;
    int (*variadic_inputs_least)(const Operator*) = nullptr;
    int (*variadic_inputs_alike)(const Operator*) = nullptr;
    int (*variadic_outputs_least)(const Operator*) = nullptr;
    int (*variadic_outputs_alike)(const Operator*) = nullptr;
    Status* (*create_checked)(const Operator*, const void* const* api, const KernelInfo*, void** kernel) = nullptr;
    Status* (*compute_checked)(void* kernel, KernelContext*) = nullptr;
    // Shapes of outputs, versions, shared memory. ONNX Runtime hands a function for the shapes dimensions of -1 and takes
    // them back as if they were known, which ends the process in Slice.
    const void* unused[7] = {};
};

}  // namespace internvl_edge::ort
