// A .pte opened in the ExecuTorch runtime, by the contract of its one `forward`.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "network.h"
#include "options.h"

namespace dreamedge {

constexpr int64_t CONTRACT_VERSION = 1;
constexpr const char* MODEL_FILE = "model.pte";

// The constant methods of a program, by their names there.
struct Metadata {
    int64_t get_contract_version, get_max_seq_len, get_max_context_len, get_max_rows, get_vocab_size, get_n_layers;
    int64_t get_bos_id;
    Tokens get_eos_ids;
    int64_t get_pad_id, get_mask_id, get_block_length, logits_shift;
    bool use_kv_cache, use_sdpa_with_kv_cache, enable_dynamic_shape;
};

// mmap: pages of the file come in as they are read, and the system may drop them. file: read into memory.
enum class Load { mmap, file };

// packed_cache: a folder that keeps what the runtime packs of the weights, and opens the program with it the next time.
struct Loading {
    Load how = Load::mmap;
    std::optional<std::filesystem::path> packed_cache = std::nullopt;
};

// `Program::open(artifact folder or .pte)`, then `forward`. The cache inside lives as long as the object.
class Program {
  public:
    // Load a program and check its contract. Throws `Error`: Exit::artifact, or Exit::resource for too little memory;
    // as `Packed` does.
    static Program open(const std::filesystem::path& path, const Loading& loading = {});

    Program(Program&&) noexcept;
    ~Program();

    // Run T tokens at cache positions start_pos .. start_pos+T-1, seeing positions 0 .. kv_len-1.
    //
    // rows: which of the T get logits, all by default. Returns raw, unshifted logits [K, vocab], which stand until the
    // next call. Throws `Error`: Exit::usage for a call outside the contract, Exit::artifact for one that fails.
    Logits forward(const Tokens& tokens, int64_t start_pos, int64_t kv_len, std::optional<Tokens> rows = std::nullopt);

    // What writing needs; it must not outlive the program. Its `start` is for a new sequence over the one cache.
    Network network();

    const std::filesystem::path& path() const;
    const Metadata& metadata() const;

  private:
    struct Inside;
    explicit Program(std::unique_ptr<Inside> inside);
    std::unique_ptr<Inside> inside_;
};

// The .pte of an artifact folder, or the file itself. Throws `Error`.
std::filesystem::path program_file(const std::filesystem::path& path);

}  // namespace dreamedge
