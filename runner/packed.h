// The packed weights of a program, kept in a file: what opens it again maps them, and packs nothing.
#pragma once

#include <executorch/runtime/backend/backend_options_map.h>

#include <filesystem>

namespace dreamedge {

// A program that is loaded with its options takes what `folder` has of it, or leaves there what it packs. While one
// process has the file open, another one packs for itself.
class Packed {
  public:
    // Throws `Error`: Exit::usage where it cannot be kept, Exit::artifact for a damaged program.
    Packed(const std::filesystem::path& program, const std::filesystem::path& folder);
    Packed(const Packed&) = delete;
    ~Packed();

    const executorch::runtime::LoadBackendOptionsMap& options() const { return by_backend_; }

    // The program is loaded, and what was packed is whole. Throws `Error`.
    void keep();

  private:
    std::filesystem::path file_, written_;
    executorch::runtime::BackendOptions<2> options_;
    executorch::runtime::LoadBackendOptionsMap by_backend_;
};

}  // namespace dreamedge
