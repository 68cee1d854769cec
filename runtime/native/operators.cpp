// Two custom operators of ONNX Runtime, with the inputs, outputs and attributes of those that they stand in for:
//
//   internvl_edge.GroupQueryAttention (com.microsoft.GroupQueryAttention without rotary embedding, float32):
//     query [batch, seq, heads * width], key and value [batch, seq, kv_heads * width],
//     past_key and past_value [batch, kv_heads, capacity, width], seqlens_k [batch] int32 (past + seq - 1), total int32
//     -> output as query, present_key and present_value as past (in place where both are bound to the same memory)
//   internvl_edge.Attention (ai.onnx.Attention of three inputs): query, key, value [batch, seq, heads * width] -> output
#include "abi.h"
#include "attention.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace internvl_edge {

#define INTERNVL_EDGE_DECLARE(level) namespace level { extern const Kernels kernels; }
INTERNVL_EDGE_LEVELS(INTERNVL_EDGE_DECLARE)

namespace {

using namespace ort;

// Whether this CPU has what a level is compiled for.
bool has(const char* level) {
    const auto is = [level](const char* name) { return std::strcmp(level, name) == 0; };
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (is("avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("fma");
    if (is("avx512")) return avx512;
    if (is("avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
    if (is("neon_bf16")) return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#endif
    return is("baseline");
}

// The kernels of the best level of this CPU, or of the one that INTERNVL_EDGE_NATIVE_LEVEL names; null where the CPU
// lacks that. Levels are declared from the plainest to the best.
const Kernels* choose() {
    const char* wanted = std::getenv("INTERNVL_EDGE_NATIVE_LEVEL");
    const Kernels* found = nullptr;
    const auto consider = [&](const Kernels& level) {
        if (has(level.name) && (!wanted || !*wanted || std::strcmp(wanted, level.name) == 0)) found = &level;
    };
#define INTERNVL_EDGE_CONSIDER(level) consider(level::kernels);
    INTERNVL_EDGE_LEVELS(INTERNVL_EDGE_CONSIDER)
    return found;
}

struct Error {
    Status* status;
};

// One call of an operator: its inputs and outputs, with errors as exceptions.
class Call {
public:
    Call(const Api& api, KernelContext* context) : api_(api), context_(context) {}

    void check(Status* status) const {
        if (status) throw Error{status};
    }
    void require(bool holds, const char* what) const {
        if (!holds) throw Error{api_.error(INVALID_ARGUMENT, what)};
    }
    template <class T>
    const T* input(size_t index, int64_t* shape, size_t rank) const {
        const Value* value = nullptr;
        check(api_.input(context_, index, &value));
        require(value != nullptr, "native attention: an input is missing");
        ShapeAndType* found = nullptr;
        check(api_.shape(value, &found));
        size_t count = 0;
        Status* failed = api_.dimensions_count(found, &count);
        if (!failed && count == rank) failed = api_.dimensions(found, shape, rank);
        api_.release(found);
        check(failed);
        require(count == rank, "native attention: an input has another rank");
        void* data = nullptr;
        check(api_.data(const_cast<Value*>(value), &data));
        return static_cast<const T*>(data);
    }
    float* output(size_t index, const int64_t* shape, size_t rank) const {
        Value* value = nullptr;
        check(api_.output(context_, index, shape, rank, &value));
        void* data = nullptr;
        check(api_.data(value, &data));
        return static_cast<float*>(data);
    }
    template <class Task>
    void parallel(size_t count, Task task) const {
        const auto run = [](void* data, size_t index) { (*static_cast<Task*>(data))(index); };
        check(api_.parallel_for(context_, run, count, &task));
    }
    void attend(const Kernels& kernels, const Attention& a) const {
        if (a.tokens > 1 || !a.causal)
            return parallel(kernels.block_tasks(a), [&](size_t task) { kernels.block(a, task); });
        const std::unique_ptr<float[]> scratch(new float[kernels.scratch_floats(a)]);
        parallel(kernels.split_tasks(a), [&](size_t task) { kernels.split(a, task, scratch.get()); });
        // A few microseconds, less than it takes to wake the other threads.
        for (size_t task = 0; task < kernels.merge_tasks(a); ++task) kernels.merge(a, task, scratch.get());
    }

private:
    const Api& api_;
    KernelContext* context_;
};

struct Kernel {
    Api api;
    const Kernels* kernels;
    int64_t heads, kv_heads;
};

Attention described(const Kernel& kernel, const Call& call, const float* query, const int64_t (&shape)[3]) {
    call.require(shape[2] % (16 * kernel.heads) == 0, "native attention: the head size is no multiple of 16");
    Attention a{};
    a.query = query;
    a.batch = shape[0], a.tokens = shape[1], a.heads = kernel.heads, a.kv_heads = kernel.kv_heads;
    a.width = shape[2] / kernel.heads;
    a.query_token = shape[2], a.query_batch = shape[1] * shape[2];
    a.scale = 1 / std::sqrt(float(a.width));
    a.output = call.output(0, shape, 3);
    return a;
}

// Copy [tokens, kv_heads, width] behind what a row of the cache [kv_heads, capacity, width] holds.
void append(const Attention& a, const float* from, float* cache) {
    for (int64_t row = 0; row < a.batch; ++row)
        for (int64_t head = 0; head < a.kv_heads; ++head)
            for (int64_t token = 0; token < a.tokens; ++token)
                std::memcpy(cache + row * a.key_batch + head * a.key_head + (a.lengths[row] - a.tokens + token) * a.width,
                            from + ((row * a.tokens + token) * a.kv_heads + head) * a.width, a.width * sizeof(float));
}

struct GroupQuery {
    static constexpr const char* NAME = "GroupQueryAttention";
    static constexpr size_t INPUTS = 7, OUTPUTS = 3;
    static constexpr const char *HEADS = "num_heads", *KV_HEADS = "kv_num_heads";
    static ElementType input_type(size_t index) { return index < 5 ? FLOAT : INT32; }

    static void compute(const Kernel& kernel, const Call& call) {
        int64_t shape[3], new_key[3], new_value[3], past[4], past_value[4], rows[1];
        const float* query = call.input<float>(0, shape, 3);
        const float* key = call.input<float>(1, new_key, 3);
        const float* value = call.input<float>(2, new_value, 3);
        const float* caches[] = {call.input<float>(3, past, 4), call.input<float>(4, past_value, 4)};
        const int32_t* last = call.input<int32_t>(5, rows, 1);
        Attention a = described(kernel, call, query, shape);
        const int64_t expected[] = {a.batch, a.tokens, a.kv_heads * a.width};
        const int64_t cache[] = {a.batch, a.kv_heads, past[2], a.width};
        call.require(std::memcmp(new_key, expected, sizeof expected) == 0 &&
                         std::memcmp(new_value, expected, sizeof expected) == 0 &&
                         std::memcmp(past, cache, sizeof cache) == 0 &&
                         std::memcmp(past_value, cache, sizeof cache) == 0 && rows[0] == a.batch,
                     "native attention: the shapes of the inputs do not fit each other");
        const std::unique_ptr<int32_t[]> lengths(new int32_t[a.batch]);
        for (int64_t row = 0; row < a.batch; ++row) {
            lengths[row] = last[row] + 1;
            call.require(a.tokens <= lengths[row] && lengths[row] <= past[2],
                         "native attention: the tokens do not fit the cache");
        }
        a.lengths = lengths.get(), a.causal = true;
        a.key_token = a.width, a.key_head = past[2] * a.width, a.key_batch = a.kv_heads * a.key_head;
        float* presents[2];
        for (int each = 0; each < 2; ++each) {
            presents[each] = call.output(1 + each, cache, 4);
            if (presents[each] != caches[each])
                std::memcpy(presents[each], caches[each], a.batch * a.key_batch * sizeof(float));
            append(a, each ? value : key, presents[each]);
        }
        a.key = presents[0], a.value = presents[1];
        if (a.batch && a.tokens) call.attend(*kernel.kernels, a);
    }
};

struct Plain {
    static constexpr const char* NAME = "Attention";
    static constexpr size_t INPUTS = 3, OUTPUTS = 1;
    static constexpr const char *HEADS = "q_num_heads", *KV_HEADS = "kv_num_heads";
    static ElementType input_type(size_t) { return FLOAT; }

    static void compute(const Kernel& kernel, const Call& call) {
        int64_t shape[3], keys[3], values[3];
        const float* query = call.input<float>(0, shape, 3);
        const float* key = call.input<float>(1, keys, 3);
        const float* value = call.input<float>(2, values, 3);
        Attention a = described(kernel, call, query, shape);
        const int64_t expected[] = {a.batch, keys[1], a.kv_heads * a.width};
        call.require(std::memcmp(keys, expected, sizeof expected) == 0 && std::memcmp(values, keys, sizeof keys) == 0,
                     "native attention: the shapes of the inputs do not fit each other");
        a.key = key, a.value = value, a.keys = keys[1];
        a.key_head = a.width, a.key_token = keys[2], a.key_batch = keys[1] * keys[2];
        if (a.batch && a.tokens && a.keys) call.attend(*kernel.kernels, a);
    }
};

template <class Op>
Operator describe() {
    Operator op;
    op.name = [](const Operator*) { return Op::NAME; };
    op.provider = [](const Operator*) -> const char* { return nullptr; };  // the CPU
    op.input_type = [](const Operator*, size_t index) { return Op::input_type(index); };
    op.input_count = [](const Operator*) { return Op::INPUTS; };
    op.output_type = [](const Operator*, size_t) { return FLOAT; };
    op.output_count = [](const Operator*) { return Op::OUTPUTS; };
    op.input_characteristic = [](const Operator*, size_t) { return REQUIRED; };
    op.output_characteristic = [](const Operator*, size_t) { return REQUIRED; };
    op.input_memory = [](const Operator*, size_t) { return 0; };
    op.create_checked = [](const Operator*, const void* const* table, const KernelInfo* info, void** made) -> Status* {
        auto kernel = std::make_unique<Kernel>(Kernel{Api(table), choose(), 0, 0});
        if (Status* failed = kernel->api.attribute(info, Op::HEADS, &kernel->heads)) return failed;
        if (Status* failed = kernel->api.attribute(info, Op::KV_HEADS, &kernel->kv_heads)) return failed;
        if (!kernel->kernels) return kernel->api.error(FAIL, "native attention has no kernels for this CPU");
        if (kernel->kv_heads < 1 || kernel->heads < 1 || kernel->heads % kernel->kv_heads)
            return kernel->api.error(INVALID_ARGUMENT, "native attention: heads is no multiple of kv_heads");
        *made = kernel.release();
        return nullptr;
    };
    op.compute_checked = [](void* made, KernelContext* context) -> Status* {
        const auto* kernel = static_cast<const Kernel*>(made);
        try {
            Op::compute(*kernel, Call(kernel->api, context));
            return nullptr;
        } catch (const Error& error) {
            return error.status;
        } catch (const std::exception& error) {
            return kernel->api.error(FAIL, error.what());
        }
    };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

}  // namespace
}  // namespace internvl_edge

#define INTERNVL_EDGE_PUBLIC extern "C" __attribute__((visibility("default")))


// The level of the kernels that run, or null where there is none for this CPU.
INTERNVL_EDGE_PUBLIC const char* internvl_edge_level() {
    const auto* found = internvl_edge::choose();
    return found ? found->name : nullptr;
}

// ONNX Runtime calls this for each session that asks for the library.
INTERNVL_EDGE_PUBLIC internvl_edge::ort::Status* RegisterCustomOps(internvl_edge::ort::SessionOptions* options,
                                                                   const internvl_edge::ort::Base* base) {
    using namespace internvl_edge;
    const ort::Api api(base->get_api(ort::VERSION));
    if (!api) return ort::Api(base->get_api(1)).error(ort::FAIL, "native attention needs ONNX Runtime 1.17 or newer");
    if (!choose()) return api.error(ort::FAIL, "native attention has no kernels for this CPU");
    static const ort::Operator operators[] = {describe<GroupQuery>(), describe<Plain>()};
    ort::Domain* domain = nullptr;  // sessions refer to it, and nobody says when the last one has ended
    if (ort::Status* failed = api.create_domain("internvl_edge", &domain)) return failed;
    for (const auto& op : operators)
        if (ort::Status* failed = api.add_operator(domain, &op)) return failed;
    return api.add_domain(options, domain);
}
