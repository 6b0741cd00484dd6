#include "program.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>

#include <algorithm>
#include <fstream>

#include "errors.h"
#include "flatbuffer.h"
#include "memory.h"
#include "packed.h"
#include "planned.h"
#include "quiet.h"

namespace dreamedge {
namespace {

namespace et = executorch::runtime;
using executorch::extension::Module;

constexpr size_t HEAD = 64;  // bytes of a .pte that hold its extended header

// The extended header says how long a program is: a shorter file was cut off.
void check_size(const std::filesystem::path& file) {
    std::string head(HEAD, '\0');
    std::ifstream opened(file, std::ios::binary);
    if (!opened) artifact_error(file.string() + ": cannot be read");
    opened.read(head.data(), HEAD);
    if (opened.gcount() < 40 || head.compare(4, 2, "ET") != 0 || head.compare(8, 4, "eh00") != 0) {
        artifact_error(file.string() + ": not an ExecuTorch program");
    }
    const uint64_t expected =
        std::max(number_at<uint64_t>(head, 16), number_at<uint64_t>(head, 24) + number_at<uint64_t>(head, 32));
    const uint64_t found = std::filesystem::file_size(file);
    if (found < expected) {
        artifact_error(file.string() + ": truncated: " + std::to_string(found) + " bytes of " +
                       std::to_string(expected));
    }
}

// Throws where memory is what was missing.
void check_memory(const std::filesystem::path& file, et::Error error, const std::string& said) {
    const bool is_memory = error == et::Error::MemoryAllocationFailed || error == et::Error::OutOfResources ||
                           error == et::Error::DelegateMemoryAllocationFailed ||
                           said.find("out_of_memory") != std::string::npos;
    if (is_memory) throw Error(Exit::resource, file.string() + ": too little memory for this program");
}

[[noreturn]] void cannot_load(const std::filesystem::path& file, et::Error error, const std::string& said) {
    check_memory(file, error, said);
    if (error == et::Error::OperatorMissing) {
        constexpr std::string_view before = "Missing operator: ";
        const size_t at = said.find(before);
        const size_t name = at == std::string::npos ? at : said.find("] ", at + before.size());
        const size_t end = name == std::string::npos ? name : said.find_first_of(" |", name + 2);
        const std::string kernel = end == std::string::npos ? "a kernel" : said.substr(name + 2, end - name - 2);
        artifact_error(file.string() + ": OperatorMissing: it needs " + kernel +
                       ", which this runner was built without");
    }
    artifact_error(file.string() + ": damaged, or not an ExecuTorch program: " + said + "its error " +
                   et::to_string(error));
}

// Constant methods: their names, and the values they give.
class Constants {
  public:
    Constants(Module& module, std::filesystem::path file) : module_(module), file_(std::move(file)) {}

    bool has(const std::string& name) { return module_.method_names()->count(name) > 0; }

    Tokens all(const std::string& name) {
        auto values = module_.execute(name);
        if (!values.ok()) artifact_error(file_.string() + ": its metadata " + name + " cannot be read");
        Tokens numbers;
        for (const auto& value : *values) {
            if (!value.isInt() && !value.isBool())
                artifact_error(file_.string() + ": its metadata " + name + " is no number");
            numbers.push_back(value.isBool() ? value.toBool() : value.toInt());
        }
        return numbers;
    }

    int64_t one(const std::string& name) {
        const Tokens values = all(name);
        if (values.size() != 1) artifact_error(file_.string() + ": its metadata " + name + " is no number");
        return values[0];
    }

  private:
    Module& module_;
    std::filesystem::path file_;
};

Metadata read_metadata(Constants constants, const std::filesystem::path& file) {
    if (!constants.has("get_contract_version") || !constants.has("forward")) {
        artifact_error(file.string() + ": an ExecuTorch program, but not one that follows DreamEdge's contract");
    }
    const int64_t version = constants.one("get_contract_version");
    if (version != CONTRACT_VERSION) {
        artifact_error(file.string() + ": made for contract version " + std::to_string(version) +
                       ", this runtime speaks " + std::to_string(CONTRACT_VERSION) + ": export it anew");
    }
    std::string missing;
    for (const char* name : {"get_max_seq_len", "get_max_context_len", "get_max_rows", "get_vocab_size", "get_n_layers",
                             "get_bos_id", "get_eos_ids", "get_pad_id", "get_mask_id", "get_block_length",
                             "logits_shift", "use_kv_cache", "use_sdpa_with_kv_cache", "enable_dynamic_shape"}) {
        if (!constants.has(name)) missing += (missing.empty() ? "" : ", ") + std::string(name);
    }
    if (!missing.empty()) artifact_error(file.string() + ": the program lacks the metadata " + missing);
    const auto one = [&](const char* name) { return constants.one(name); };
    return {version,
            one("get_max_seq_len"),
            one("get_max_context_len"),
            one("get_max_rows"),
            one("get_vocab_size"),
            one("get_n_layers"),
            one("get_bos_id"),
            constants.all("get_eos_ids"),
            one("get_pad_id"),
            one("get_mask_id"),
            one("get_block_length"),
            one("logits_shift"),
            one("use_kv_cache") != 0,
            one("use_sdpa_with_kv_cache") != 0,
            one("enable_dynamic_shape") != 0};
}

// What nothing could be written with.
void check_metadata(const Metadata& meta, const std::filesystem::path& file) {
    const auto is_id = [&](int64_t token) { return 0 <= token && token < meta.get_vocab_size; };
    const bool can_be = meta.get_max_seq_len >= 1 && meta.get_max_seq_len <= INT32_MAX && meta.get_max_rows >= 1 &&
                        meta.get_vocab_size >= 2 && meta.get_vocab_size <= INT32_MAX && meta.get_block_length >= 1 &&
                        is_id(meta.get_mask_id) && is_id(meta.get_pad_id);
    if (!can_be)
        artifact_error(file.string() +
                       ": its metadata are of no program: lengths below 1, or ids beyond the vocabulary");
}

}  // namespace

struct Program::Inside {
    std::filesystem::path file;
    std::optional<Planned> planned;  // outlives the module, whose method has its tensors there
    Module module;
    Metadata metadata{};
    std::vector<Place> places;  // looked up once: the list is long, and takes more time than a call of a small network

    Inside(std::filesystem::path path, Load how)
        : file(std::move(path)),
          module(file.string(), how == Load::mmap ? Module::LoadMode::Mmap : Module::LoadMode::File) {}
};

Program Program::open(const std::filesystem::path& path, const Loading& loading) {
    const std::filesystem::path file = program_file(path);
    check_size(file);
    auto inside = std::make_unique<Inside>(file, loading.how);
    const Quiet quiet;
    if (const auto error = inside->module.load(et::Program::Verification::InternalConsistency); error != et::Error::Ok)
        cannot_load(file, error, quiet.said());
    inside->metadata = read_metadata(Constants(inside->module, file), file);
    check_metadata(inside->metadata, file);
    std::optional<Packed> packed;
    if (loading.packed_cache) packed.emplace(file, *loading.packed_cache);
    const auto* options = packed ? &packed->options() : nullptr;
    const auto meta = inside->module.method_meta("forward");
    if (!meta.ok()) cannot_load(file, meta.error(), quiet.said());
    inside->planned.emplace(*meta, file);
    const auto error = inside->module.load_method("forward", inside->planned->allocator(), nullptr, options);
    if (error != et::Error::Ok) cannot_load(file, error, quiet.said());
    if (packed) packed->keep();
    inside->places = mapped(file);
    unpin(inside->places);
    return Program(std::move(inside));
}

Program::Program(std::unique_ptr<Inside> inside) : inside_(std::move(inside)) {}
Program::Program(Program&&) noexcept = default;
Program::~Program() = default;

const std::filesystem::path& Program::path() const { return inside_->file; }

const Metadata& Program::metadata() const { return inside_->metadata; }

Network Program::network() {
    const Metadata& meta = inside_->metadata;
    return {meta.get_max_seq_len,
            meta.get_max_rows,
            meta.get_vocab_size,
            meta.get_mask_id,
            meta.get_pad_id,
            meta.get_eos_ids,
            meta.get_block_length,
            [this]() -> Forward {
                unpin(inside_->places);  // the rows of the embedding that the last sequence read
                return [this](const Tokens& tokens, int64_t start_pos, int64_t kv_len, const Tokens& rows) {
                    return forward(tokens, start_pos, kv_len, rows);
                };
            }};
}

Logits Program::forward(const Tokens& tokens, int64_t start_pos, int64_t kv_len, std::optional<Tokens> rows) {
    const Metadata& meta = inside_->metadata;
    const auto T = static_cast<int64_t>(tokens.size());
    if (!rows) {
        rows.emplace();
        for (int64_t row = 0; row < T; ++row) rows->push_back(row);
    }
    const auto K = static_cast<int64_t>(rows->size());
    const auto within = [](const Tokens& values, int64_t end) {
        return std::all_of(values.begin(), values.end(), [&](int64_t value) { return 0 <= value && value < end; });
    };
    const std::string longest = std::to_string(meta.get_max_seq_len);
    if (T < 1 || T > meta.get_max_seq_len) {
        usage_error("tokens: 1 to " + longest + " (max_seq_len) fit in a call, got " + std::to_string(T));
    }
    if (!within(tokens, meta.get_vocab_size)) {
        usage_error("tokens: ids must be in 0.." + std::to_string(meta.get_vocab_size - 1));
    }
    if (start_pos < 0 || start_pos > kv_len - T || kv_len > meta.get_max_seq_len) {
        usage_error("0 <= start_pos and start_pos + T <= kv_len <= max_seq_len must hold, got start_pos " +
                    std::to_string(start_pos) + ", T " + std::to_string(T) + ", kv_len " + std::to_string(kv_len) +
                    ", max_seq_len " + longest);
    }
    if (K < 1 || K > meta.get_max_rows) {
        usage_error("rows: 1 to " + std::to_string(meta.get_max_rows) + " a call, got " + std::to_string(K));
    }
    if (!within(*rows, T)) usage_error("rows: must be in 0.." + std::to_string(T - 1) + ", the tokens of this call");
    using executorch::extension::make_tensor_ptr;
    using Type = executorch::aten::ScalarType;
    const auto as_tensor = [](const Tokens& values, std::vector<executorch::aten::SizesType> shape) {
        return make_tensor_ptr(std::move(shape), const_cast<int64_t*>(values.data()), Type::Long);
    };
    using Size = executorch::aten::SizesType;
    const Tokens start{start_pos}, seen{kv_len};
    const auto inputs = {as_tensor(tokens, {1, static_cast<Size>(T)}), as_tensor(start, {1}), as_tensor(seen, {1}),
                         as_tensor(*rows, {static_cast<Size>(K)})};
    const Quiet quiet;
    const std::vector<et::EValue> values(inputs.begin(), inputs.end());
    auto outputs = inside_->module.forward(values);
    if (!outputs.ok()) {
        check_memory(inside_->file, outputs.error(), quiet.said());
        artifact_error(inside_->file.string() + ": forward failed in the runtime: " + quiet.said() + "its error " +
                       et::to_string(outputs.error()));
    }
    const bool is_tensor = outputs->size() == 1 && outputs->at(0).isTensor();
    const bool is_logits = is_tensor && outputs->at(0).toTensor().scalar_type() == Type::Float &&
                           outputs->at(0).toTensor().numel() == K * meta.get_vocab_size;
    if (!is_logits)
        artifact_error(inside_->file.string() + ": forward gave no logits of " + std::to_string(K) + " rows");
    return {outputs->at(0).toTensor().const_data_ptr<float>(), K, meta.get_vocab_size};
}

std::filesystem::path program_file(const std::filesystem::path& path) {
    std::error_code ignored;
    auto file = std::filesystem::is_directory(path, ignored) ? path / MODEL_FILE : path;
    if (!std::filesystem::is_regular_file(file, ignored)) {
        artifact_error(path.string() + ": no artifact folder with a " + MODEL_FILE + ", and no .pte file");
    }
    return file;
}

}  // namespace dreamedge
