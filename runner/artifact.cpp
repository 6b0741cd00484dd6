#include "artifact.h"

#include <fstream>
#include <map>
#include <stdexcept>
#include <vector>

#include "errors.h"
#include "program.h"
#include "sha256.h"

namespace dreamedge {
namespace {

namespace fs = std::filesystem;

// sha256 by name of the files that a provenance speaks of, all others of the folder.
std::map<std::string, std::string> subjects(const fs::path& file) {
    std::error_code ignored;
    if (!fs::is_regular_file(file, ignored)) {
        artifact_error(file.string() + ": missing: nothing says what the other files are");
    }
    try {
        std::map<std::string, std::string> found;
        const Json provenance = parse_json(read_file(file, MAX_JSON));
        for (const Json& subject : member(provenance, "subject")) {
            found[text_of(subject, "name")] = text_of(member(subject, "digest"), "sha256");
        }
        return found;
    } catch (const std::invalid_argument& error) {
        artifact_error(file.string() + ": not a provenance statement: " + error.what());
    }
}

struct Entry {
    std::string sha256;
    int64_t bytes;
};

// Of those that every build repeats, and of those of this one run.
std::map<std::string, Entry> files_of(const fs::path& file, const Json& manifest) {
    try {
        std::map<std::string, Entry> entries;
        for (const Json* files : {&member(manifest, "files"), &member(member(manifest, "run"), "files")}) {
            for (const auto& [name, entry] : files->items()) {
                entries[name] = {text_of(entry, "sha256"), whole_of(entry, "bytes")};
            }
        }
        return entries;
    } catch (const std::invalid_argument& error) {
        artifact_error(file.string() + ": not a manifest: " + error.what());
    }
}

void check_file(const fs::path& path, const Entry& entry) {
    std::error_code failed;
    if (!fs::is_regular_file(path, failed)) artifact_error(path.string() + ": missing, the manifest names it");
    const auto size = static_cast<int64_t>(fs::file_size(path, failed));
    if (size != entry.bytes) {
        artifact_error(path.string() + ": " + std::to_string(size) + " bytes, the manifest says " +
                       std::to_string(entry.bytes));
    }
    if (sha256(path) != entry.sha256) {
        artifact_error(path.string() + ": its sha256 is not the manifest's: the file was changed");
    }
}

}  // namespace

Json load_manifest(const fs::path& folder) {
    const fs::path file = folder / MANIFEST_FILE;
    std::error_code failed;
    if (!fs::is_directory(folder, failed)) artifact_error(folder.string() + ": no such artifact folder");
    if (!fs::is_regular_file(file, failed)) {
        artifact_error(folder.string() + ": no " + MANIFEST_FILE + ": not an artifact, or not a whole one");
    }
    for (const auto& entry : fs::directory_iterator(folder, failed)) {
        if (entry.is_symlink(failed)) {
            artifact_error(entry.path().string() + ": a link; an artifact holds all its files itself");
        }
    }
    try {
        Json manifest = parse_json(read_file(file, MAX_JSON));
        const Json& version = member(manifest, "schema_version");
        if (version != SCHEMA_VERSION) {
            artifact_error(file.string() + ": schema version " + one_line(version.dump(), 40) +
                           ", this program reads version " + std::to_string(SCHEMA_VERSION));
        }
        return manifest;
    } catch (const std::invalid_argument& error) {
        artifact_error(file.string() + ": not a manifest: " + error.what());
    }
}

Json read_manifest(const fs::path& folder) {
    const fs::path file = folder / MANIFEST_FILE;
    Json manifest = load_manifest(folder);
    const auto said = subjects(folder / PROVENANCE_FILE);
    const auto digest = said.find(MANIFEST_FILE);
    try {
        if (digest == said.end() || sha256(file) != digest->second) {
            artifact_error(file.string() + ": its sha256 is not the one in " + PROVENANCE_FILE +
                           ": the file was changed");
        }
        const auto entries = files_of(file, manifest);
        for (const char* needed : {MODEL_FILE, REFERENCE_FILE}) {
            if (entries.count(needed) == 0) artifact_error(file.string() + ": names no " + needed);
        }
        std::map<std::string, std::string> found{{MANIFEST_FILE, digest->second}};
        for (const auto& [name, entry] : entries) {
            if (name.empty() || fs::path(name).filename() != name || name == "..") {
                artifact_error(file.string() + ": " + in_quotes(name) + " is no file of this folder");
            }
            check_file(folder / name, entry);
            found[name] = entry.sha256;
        }
        if (found != said) {
            artifact_error((folder / PROVENANCE_FILE).string() + ": names other files than " + MANIFEST_FILE +
                           ": the file was changed");
        }
        return manifest;
    } catch (const std::invalid_argument& error) {
        artifact_error(folder.string() + ": cannot be read: " + error.what());
    }
}

std::string sha256(const fs::path& file) {
    std::ifstream opened(file, std::ios::binary);
    if (!opened) throw std::invalid_argument(file.filename().string() + ": cannot be opened");
    Sha256 digest;
    std::vector<char> part(1 << 16);
    while (opened.read(part.data(), static_cast<std::streamsize>(part.size())) || opened.gcount() > 0) {
        digest.update(part.data(), static_cast<size_t>(opened.gcount()));
    }
    return digest.hex();
}

}  // namespace dreamedge
