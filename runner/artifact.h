// An artifact folder: its manifest, its hashes, and the check that needs nothing else.
#pragma once

#include <filesystem>
#include <string>

#include "json.h"

namespace dreamedge {

constexpr const char* MANIFEST_FILE = "manifest.json";
constexpr const char* PROVENANCE_FILE = "provenance.json";
constexpr const char* REFERENCE_FILE = "reference.safetensors";
constexpr const char* TOKENIZER_FILE = "tokenizer.json";
constexpr int64_t SCHEMA_VERSION = 10;

// The manifest as it stands; what it says of the files is not looked at. Throws `Error` (Exit::artifact).
Json load_manifest(const std::filesystem::path& folder);

// The manifest, once it and every file that it names are as provenance.json says. Throws `Error` (Exit::artifact).
Json read_manifest(const std::filesystem::path& folder);

// In hexadecimal. Throws `std::invalid_argument`.
std::string sha256(const std::filesystem::path& file);

}  // namespace dreamedge
