// A libnvrtc.so.12 that compiles a program for the CPU with g++. What it gives as a CUBIN is a shared library, for
// driver.cpp alone. See README.md.

#include <cctype>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <elf.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

extern char **environ;

// The headers of the emulation, which the library carries with it.
#define EMBED(name, file)                                                                                              \
    asm(".section .rodata\n"                                                                                           \
        #name "_start:\n"                                                                                              \
        ".incbin \"" file "\"\n"                                                                                       \
        #name "_end:\n"                                                                                                \
        ".byte 0\n"                                                                                                    \
        ".text\n");                                                                                                    \
    extern "C" __attribute__((visibility("hidden"))) const char name##_start[], name##_end[];
EMBED(runtime_h, "runtime.h")
EMBED(device_h, "device.h")
EMBED(instructions_cuh, "instructions.cuh")
EMBED(hopper_cuh, "hopper.cuh")
#define EMBEDDED(name) std::string(name##_start, name##_end)

enum Result : int {
    SUCCESS = 0,
    OUT_OF_MEMORY = 1,
    PROGRAM_CREATION_FAILURE = 2,
    INVALID_INPUT = 3,
    INVALID_PROGRAM = 4,
    INVALID_OPTION = 5,
    COMPILATION = 6,
    BUILTIN_OPERATION_FAILURE = 7,
    NO_NAME_EXPRESSIONS_AFTER_COMPILATION = 8,
    NO_LOWERED_NAMES_BEFORE_COMPILATION = 9,
    NAME_EXPRESSION_NOT_VALID = 10,
    INTERNAL_ERROR = 11,
};

EXPORT const char *nvrtcGetErrorString(int result) {
    static const char *const NAMES[] = {
        "NVRTC_SUCCESS",
        "NVRTC_ERROR_OUT_OF_MEMORY",
        "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
        "NVRTC_ERROR_INVALID_INPUT",
        "NVRTC_ERROR_INVALID_PROGRAM",
        "NVRTC_ERROR_INVALID_OPTION",
        "NVRTC_ERROR_COMPILATION",
        "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE",
        "NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION",
        "NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
        "NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID",
        "NVRTC_ERROR_INTERNAL_ERROR",
    };
    return result >= 0 && result < 12 ? NAMES[result] : "NVRTC_ERROR unknown";
}

struct Program {
    std::string name, source, log, cubin, ptx;
    std::map<std::string, std::string> headers;
};

EXPORT Result nvrtcVersion(int *major, int *minor) {
    if (!major || !minor) return INVALID_INPUT;
    *major = 12, *minor = 8;
    return SUCCESS;
}

static const int ARCHITECTURES[] = {50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 120};

EXPORT Result nvrtcGetNumSupportedArchs(int *count) {
    if (!count) return INVALID_INPUT;
    *count = (int)(sizeof(ARCHITECTURES) / sizeof(*ARCHITECTURES));
    return SUCCESS;
}

EXPORT Result nvrtcGetSupportedArchs(int *architectures) {
    if (!architectures) return INVALID_INPUT;
    memcpy(architectures, ARCHITECTURES, sizeof(ARCHITECTURES));
    return SUCCESS;
}

EXPORT Result nvrtcCreateProgram(
    Program **program, const char *source, const char *name, int count, const char *const *headers,
    const char *const *names
) {
    if (!program || !source || count < 0 || (count && (!headers || !names))) return INVALID_INPUT;
    *program = new Program();
    (*program)->source = source;
    (*program)->name = name && *name ? name : "default_program";
    for (int i = 0; i < count; i++) (*program)->headers[names[i]] = headers[i];
    return SUCCESS;
}

EXPORT Result nvrtcDestroyProgram(Program **program) {
    if (!program || !*program) return INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------------------------
// The text of a program

static bool in_name(char c) { return isalnum((unsigned char)c) || c == '_'; }

// The same text with blanks in place of comments and of what stands in quotation marks: a search finds code only.
static std::string without_comments(const std::string &text) {
    std::string result = text;
    size_t i = 0;
    auto blank = [&](size_t from, size_t to) {
        for (size_t j = from; j < to && j < result.size(); j++) {
            if (result[j] != '\n') result[j] = ' ';
        }
    };
    while (i < text.size()) {
        if (!text.compare(i, 2, "//")) {
            size_t end = text.find('\n', i);
            if (end == std::string::npos) end = text.size();
            blank(i, end);
            i = end;
        } else if (!text.compare(i, 2, "/*")) {
            size_t end = text.find("*/", i + 2);
            end = end == std::string::npos ? text.size() : end + 2;
            blank(i, end);
            i = end;
        } else if (text[i] == '"' || (text[i] == '\'' && (i == 0 || !in_name(text[i - 1])))) {
            char quote = text[i];
            size_t end = i + 1;
            while (end < text.size() && text[end] != quote && text[end] != '\n') end += text[end] == '\\' ? 2 : 1;
            // The C of extern "C" stays.
            if (!(quote == '"' && end == i + 2 && text[i + 1] == 'C')) blank(i + 1, end);
            i = end + 1;
        } else {
            i++;
        }
    }
    return result;
}

static size_t find_word(const std::string &text, const char *word, size_t from) {
    size_t length = strlen(word);
    for (size_t at = text.find(word, from); at != std::string::npos; at = text.find(word, at + 1)) {
        if ((at == 0 || !in_name(text[at - 1])) && (at + length >= text.size() || !in_name(text[at + length]))) {
            return at;
        }
    }
    return std::string::npos;
}

static size_t skip_blanks(const std::string &text, size_t at) {
    while (at < text.size() && isspace((unsigned char)text[at])) at++;
    return at;
}

// The place after the parenthesis that closes the one at the place given.
static size_t after_parenthesis(const std::string &text, size_t at) {
    int depth = 0;
    for (; at < text.size(); at++) {
        if (text[at] == '(') depth++;
        if (text[at] == ')' && --depth == 0) return at + 1;
    }
    return std::string::npos;
}

// Whether the text includes a header, by way of others if need be.
static bool includes(
    const std::string &text, const std::string &wanted, const std::map<std::string, std::string> &files, int depth = 0
) {
    for (size_t at = text.find("#include \""); at != std::string::npos; at = text.find("#include \"", at + 1)) {
        size_t from = at + 10, end = text.find('"', from);
        if (end == std::string::npos) break;
        std::string name = text.substr(from, end - from);
        if (name == wanted) return true;
        auto found = files.find(name);
        if (found != files.end() && depth < 20 && includes(found->second, wanted, files, depth + 1)) return true;
    }
    return false;
}

static std::string on_one_line(std::string text) {
    for (char &c : text) {
        if (c == '\n') c = ' ';
    }
    return text;
}

struct Edit {
    size_t from, to;
    std::string text;
};

// Makes of `extern __shared__ T name[];` a pointer to the dynamic shared memory, and declares, before each kernel, the
// kernel and what launches it. Lines keep their numbers.
static std::string rewritten(const std::string &source) {
    std::string code = without_comments(source);
    std::vector<Edit> edits;

    for (size_t at = find_word(code, "extern", 0); at != std::string::npos; at = find_word(code, "extern", at + 1)) {
        size_t next = skip_blanks(code, at + 6);
        if (code.compare(next, 10, "__shared__")) continue;
        size_t end = code.find(';', next), bracket = code.find('[', next);
        if (end == std::string::npos || bracket == std::string::npos || bracket > end) continue;
        size_t name_end = bracket;
        while (name_end > next && isspace((unsigned char)code[name_end - 1])) name_end--;
        size_t name = name_end;
        while (name > next && in_name(code[name - 1])) name--;
        std::string type = code.substr(next + 10, name - next - 10);
        for (const char *word : {"__align__", "alignas", "__attribute__"}) {
            size_t place = find_word(type, word, 0);
            if (place == std::string::npos) continue;
            size_t open = type.find('(', place);
            if (open == std::string::npos) continue;
            size_t close = after_parenthesis(type, open);
            if (close != std::string::npos) type.erase(place, close - place);
        }
        int depth = 0; // of braces; those of namespaces and of extern "C" do not count, but are rare
        for (size_t i = 0; i < at; i++) depth += code[i] == '{' ? 1 : code[i] == '}' ? -1 : 0;
        std::string variable = code.substr(name, name_end - name);
        std::string text = "static const emulation::Dynamic<" + type + "> " + variable;
        if (depth > 0) {
            text = type + " *const " + variable + " = (" + type + " *)emulation::thread->block->dynamic";
        }
        int lines = 0;
        for (size_t i = at; i < end; i++) lines += code[i] == '\n';
        edits.push_back({at, end, on_one_line(text) + std::string((size_t)lines, '\n')});
    }

    for (size_t at = find_word(code, "__global__", 0); at != std::string::npos;
         at = find_word(code, "__global__", at + 1)) {
        size_t line = code.rfind('\n', at);
        if (code[skip_blanks(code, line == std::string::npos ? 0 : line)] == '#') continue; // of a macro's definition
        size_t from = at;
        size_t linkage = code.rfind("extern", at);
        if (linkage != std::string::npos && code.find_first_of(";{}", linkage) > at) from = linkage;
        size_t cursor = at + 10;
        std::string bounds, name;
        while (cursor < code.size()) {
            cursor = skip_blanks(code, cursor);
            size_t end = cursor;
            while (end < code.size() && in_name(code[end])) end++;
            if (end == cursor) break;
            std::string word = code.substr(cursor, end - cursor);
            size_t after = skip_blanks(code, end);
            if (after < code.size() && code[after] == '(') {
                size_t close = after_parenthesis(code, after);
                if (close == std::string::npos) break;
                std::string inside = code.substr(after + 1, close - after - 2);
                if (word == "__launch_bounds__") {
                    bounds = inside;
                } else if (word != "__attribute__" && word != "__cluster_dims__") {
                    name = word;
                    size_t body = skip_blanks(code, close);
                    if (body < code.size() && code[body] == '{') {
                        edits.push_back({from, from, "extern \"C\" void " + name + "(" + on_one_line(inside) +
                                                         "); EMULATION_KERNEL(" + name + ", " + on_one_line(bounds) +
                                                         ") "});
                    }
                    break;
                }
                cursor = close;
            } else {
                cursor = end;
            }
        }
    }

    std::string result = source;
    // From the last to the first, so that places stay valid.
    for (size_t i = 1; i < edits.size(); i++) {
        for (size_t j = i; j > 0 && edits[j - 1].from < edits[j].from; j--) std::swap(edits[j - 1], edits[j]);
    }
    for (const Edit &edit : edits) result.replace(edit.from, edit.to - edit.from, edit.text);
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Compilation

static bool write_file(const std::string &path, const std::string &text) {
    FILE *file = fopen(path.c_str(), "wb");
    if (!file) return false;
    bool written = fwrite(text.data(), 1, text.size(), file) == text.size();
    return fclose(file) == 0 && written;
}

static bool read_file(const std::string &path, std::string *text) {
    FILE *file = fopen(path.c_str(), "rb");
    if (!file) return false;
    char buffer[65536];
    text->clear();
    for (size_t count; (count = fread(buffer, 1, sizeof(buffer), file));) text->append(buffer, count);
    fclose(file);
    return true;
}

static std::string environment(const char *name, const char *otherwise) {
    const char *text = getenv(name);
    return text && *text ? text : otherwise;
}

static int run(const std::vector<std::string> &arguments, const std::string &output) {
    std::vector<char *> pointers;
    for (const std::string &argument : arguments) pointers.push_back(const_cast<char *>(argument.c_str()));
    pointers.push_back(nullptr);
    // The compiler must not find the emulated libraries in place of real ones, nor translate its messages.
    std::vector<char *> variables;
    for (char **variable = environ; *variable; variable++) {
        if (strncmp(*variable, "LC_", 3) && strncmp(*variable, "LANG", 4) && strncmp(*variable, "LD_", 3)) {
            variables.push_back(*variable);
        }
    }
    char language[] = "LC_ALL=C";
    variables.push_back(language);
    variables.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t process;
    int error = posix_spawnp(&process, pointers[0], &actions, nullptr, pointers.data(), variables.data());
    posix_spawn_file_actions_destroy(&actions);
    if (error) return -error;
    int status = 0;
    while (waitpid(process, &status, 0) < 0) {
        if (errno != EINTR) return -errno;
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static void remove_folder(const std::string &folder, const std::vector<std::string> &files) {
    for (const std::string &file : files) unlink((folder + "/" + file).c_str());
    rmdir(folder.c_str());
}

static uint64_t hash_of(const std::string &text, uint64_t hash) {
    for (unsigned char c : text) hash = (hash ^ c) * 0x100000001b3ull;
    return hash;
}

// The bytes of .bss, which are those of the shared variables.
static size_t shared_size(const std::string &library) {
    if (library.size() < sizeof(Elf64_Ehdr)) return 0;
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)library.data();
    size_t size = 0;
    for (int i = 0; i < header->e_shnum; i++) {
        const Elf64_Shdr *section =
            (const Elf64_Shdr *)(library.data() + header->e_shoff + (size_t)i * header->e_shentsize);
        if (section->sh_type == SHT_NOBITS && section->sh_flags & SHF_WRITE) size += section->sh_size;
    }
    return size;
}

static bool starts(const std::string &text, const char *with) { return !text.compare(0, strlen(with), with); }

EXPORT Result nvrtcCompileProgram(Program *program, int count, const char *const *options) {
    if (!program) return INVALID_PROGRAM;
    program->log.clear();
    program->cubin.clear();
    program->ptx.clear();

    std::vector<std::string> definitions;
    std::string architecture = "52";
    bool real = true; // sm_ and not compute_
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        auto value = [&](const char *name) {
            size_t length = strlen(name);
            if (option.size() > length && option[length] == '=') return option.substr(length + 1);
            return i + 1 < count ? std::string(options[++i]) : std::string();
        };
        if (option == "-D" || option == "--define-macro" || starts(option, "--define-macro=")) {
            definitions.push_back("-D" + value(option == "-D" ? "-D" : "--define-macro"));
        } else if (starts(option, "-D") || starts(option, "-U")) {
            definitions.push_back(option);
        } else if (starts(option, "--gpu-architecture") || starts(option, "-arch")) {
            std::string text = value(starts(option, "-arch") ? "-arch" : "--gpu-architecture");
            real = starts(text, "sm_");
            architecture = text.substr(text.find('_') + 1);
            int number = atoi(architecture.c_str());
            bool known = real || starts(text, "compute_");
            bool listed = false;
            for (int known_number : ARCHITECTURES) listed |= known_number == number;
            std::string suffix = architecture.substr(std::to_string(number).size());
            known &= listed && (suffix.empty() || (suffix == "a" && number >= 90));
            if (!known) {
                program->log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
                return INVALID_OPTION;
            }
        } else if (starts(option, "--std=") || starts(option, "-std=") || starts(option, "--ptxas-options") ||
                   starts(option, "-Xptxas") || starts(option, "--maxrregcount") || starts(option, "--fmad") ||
                   starts(option, "-fmad") || starts(option, "--use_fast_math") || starts(option, "-use_fast_math") ||
                   starts(option, "--ftz") || starts(option, "--prec-") || starts(option, "-default-device") ||
                   starts(option, "--device-as-default") || starts(option, "-lineinfo") ||
                   starts(option, "--generate-line-info") || starts(option, "--extra-device-vectorization") ||
                   starts(option, "--restrict") || starts(option, "-restrict") || starts(option, "-w") ||
                   starts(option, "--disable-warnings") || starts(option, "-G") || starts(option, "--device-debug") ||
                   starts(option, "--diag-") || starts(option, "--no-source-include") || starts(option, "--minimal") ||
                   starts(option, "--split-compile") || starts(option, "--builtin-") || starts(option, "-dopt") ||
                   starts(option, "--dopt") || starts(option, "--ptxas") || starts(option, "--Ofast-compile")) {
            // Nothing that would change what is computed here.
        } else {
            program->log = "nvrtc: error: unrecognized option " + option + " found\n";
            return INVALID_OPTION;
        }
    }

    std::map<std::string, std::string> files;
    for (auto &header : program->headers) {
        const std::string &header_name = header.first;
        if (header_name.find('/') != std::string::npos) {
            program->log = "the emulation takes no folders in the names of headers: " + header_name + "\n";
            return COMPILATION;
        }
        files[header_name] = header_name == "instructions.cuh" ? EMBEDDED(instructions_cuh)
                             : header_name == "hopper.cuh"     ? EMBEDDED(hopper_cuh)
                                                               : rewritten(header.second);
    }
    files["emulation runtime.h"] = EMBEDDED(runtime_h);
    std::string device = EMBEDDED(device_h);
    size_t include = device.find("#include \"runtime.h\"");
    if (include != std::string::npos) device.replace(include, 20, "#include \"emulation runtime.h\"");
    files["emulation device.h"] = device;
    std::string number = std::to_string(atoi(architecture.c_str()));
    bool checks = atoi(environment("NEARFAR_EMULATED_GUARDS", "0").c_str()) != 0;
    bool races = atoi(environment("NEARFAR_EMULATED_RACES", "0").c_str()) != 0;
    std::string version = std::to_string(EMULATION_VERSION * 4 + races * 2 + checks);
    files["emulation program.cpp"] = "#include \"emulation device.h\"\nEMULATION_MODULE(" + version + "ul, \"" +
                                     (real ? "" : "p") + architecture + "\")\n#line 1 \"" + program->name + "\"\n" +
                                     rewritten(program->source) + "\n";

    std::vector<std::string> arguments = {
        environment("NEARFAR_EMULATED_COMPILER", "g++"), "-x", "c++", "-std=gnu++17", "-O1", "-march=native",
        "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pipe", "-w",
        "-Wno-register", "-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables", "-fno-stack-protector",
        "-fno-gnu-unique",
        "-fvisibility=hidden", "-fno-strict-aliasing", "-fmax-errors=20", "-fno-diagnostics-show-caret",
#if defined(__x86_64__)
        "-ffixed-r15", "-fcf-protection=none",
#elif defined(__aarch64__)
        "-ffixed-x28",
#endif
        "-nostartfiles", "-Wl,--build-id=none", "-Wl,-Bsymbolic", "-D__CUDACC__=1", "-D__CUDACC_RTC__=1",
        "-D__NVCC__=1", "-D__CUDACC_VER_MAJOR__=12", "-D__CUDACC_VER_MINOR__=8", "-DEMULATION=1",
        "-D__CUDA_ARCH__=" + number + "0",
    };
    if (architecture.back() == 'a') arguments.push_back("-D__CUDA_ARCH_FEAT_SM" + number + "_ALL=1");
    if (checks) {
        // A check that fails ends the process with an illegal instruction, of which the driver tells.
        arguments.push_back("-fsanitize=bounds,alignment,integer-divide-by-zero");
        arguments.push_back("-fsanitize-undefined-trap-on-error");
    }
    // How the instructions of Hopper order accesses is not known to what looks for races.
    if (races && !includes(program->source, "hopper.cuh", files)) {
        arguments.push_back("-DEMULATION_RACES=1");
        arguments.push_back("-fsanitize=thread");
        arguments.push_back("-nodefaultlibs");
    }
    if (checks || races) {
        arguments.push_back("-g1");
        arguments.push_back("-gdwarf-4");
    }
    std::string more = environment("NEARFAR_EMULATED_COMPILER_OPTIONS", "");
    for (size_t at = 0; at < more.size();) {
        size_t end = more.find(' ', at);
        if (end == std::string::npos) end = more.size();
        if (end > at) arguments.push_back(more.substr(at, end - at));
        at = end + 1;
    }
    arguments.insert(arguments.end(), definitions.begin(), definitions.end());

    // What was compiled before need not be again, where a folder to keep it in is named.
    std::string cache = environment("NEARFAR_EMULATED_CACHE", ""), cached;
    if (!cache.empty()) {
        uint64_t a = 0xcbf29ce484222325ull, b = 0x84222325cbf29ce4ull;
        for (auto &file : files) {
            a = hash_of(file.second, hash_of(file.first + "\n", a));
            b = hash_of(file.second, hash_of(file.first + "\t", b));
        }
        for (const std::string &argument : arguments) {
            a = hash_of(argument + "\n", a);
            b = hash_of(argument + "\t", b);
        }
        char text[64];
        snprintf(text, sizeof(text), "/%016llx%016llx.so", (unsigned long long)a, (unsigned long long)b);
        mkdir(cache.c_str(), 0777);
        cached = cache + text;
    }

    std::string library;
    if (cached.empty() || !read_file(cached, &library)) {
        std::string folder = environment("TMPDIR", "/tmp") + "/nearfar-nvrtc-XXXXXX";
        if (!mkdtemp(&folder[0])) {
            program->log = "no temporary folder\n";
            return INTERNAL_ERROR;
        }
        std::vector<std::string> written = {"program.so", "log"};
        bool complete = true;
        for (auto &file : files) {
            written.push_back(file.first);
            complete &= write_file(folder + "/" + file.first, file.second);
        }
        for (const std::string &argument : {"-I" + folder, folder + "/emulation program.cpp", std::string("-o"),
                                            folder + "/program.so", std::string("-lm"), std::string("-lc")}) {
            arguments.push_back(argument);
        }
        int status = complete ? run(arguments, folder + "/log") : -EIO;
        read_file(folder + "/log", &program->log);
        for (size_t at; (at = program->log.find(folder + "/")) != std::string::npos;) {
            program->log.erase(at, folder.size() + 1);
        }
        bool linked = status == 0 && read_file(folder + "/program.so", &library);
        if (!atoi(environment("NEARFAR_EMULATED_KEEP", "0").c_str())) remove_folder(folder, written);
        if (status < 0) {
            program->log += arguments[0] + ": " + strerror(-status) + "\n";
            return INTERNAL_ERROR;
        }
        if (!linked) return COMPILATION;
        if (!cached.empty()) {
            std::string temporary = cached + "." + std::to_string(getpid()) + "." + std::to_string((uintptr_t)program);
            if (write_file(temporary, library)) rename(temporary.c_str(), cached.c_str());
        }
    }

    size_t shared = shared_size(library);
    if (shared > 48 << 10) {
        program->log += "ptxas error   : the program uses too much shared data (" + std::to_string(shared) +
                        " bytes, 49152 max)\n";
        return COMPILATION;
    }
    static const char DIGITS[] = "0123456789abcdef";
    program->ptx = "// PTX of the emulation: ";
    for (unsigned char c : library) {
        program->ptx += DIGITS[c >> 4];
        program->ptx += DIGITS[c & 15];
    }
    program->ptx += "\n";
    if (real) program->cubin = library;
    return SUCCESS;
}

EXPORT Result nvrtcGetCUBINSize(Program *program, size_t *size) {
    if (!program || !size) return INVALID_PROGRAM;
    *size = program->cubin.size();
    return SUCCESS;
}

EXPORT Result nvrtcGetCUBIN(Program *program, char *cubin) {
    if (!program || !cubin) return INVALID_PROGRAM;
    memcpy(cubin, program->cubin.data(), program->cubin.size());
    return SUCCESS;
}

EXPORT Result nvrtcGetPTXSize(Program *program, size_t *size) {
    if (!program || !size) return INVALID_PROGRAM;
    *size = program->ptx.size() + 1;
    return SUCCESS;
}

EXPORT Result nvrtcGetPTX(Program *program, char *ptx) {
    if (!program || !ptx) return INVALID_PROGRAM;
    memcpy(ptx, program->ptx.c_str(), program->ptx.size() + 1);
    return SUCCESS;
}

EXPORT Result nvrtcGetProgramLogSize(Program *program, size_t *size) {
    if (!program || !size) return INVALID_PROGRAM;
    *size = program->log.size() + 1;
    return SUCCESS;
}

EXPORT Result nvrtcGetProgramLog(Program *program, char *log) {
    if (!program || !log) return INVALID_PROGRAM;
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}

EXPORT Result nvrtcAddNameExpression(Program *, const char *) { return BUILTIN_OPERATION_FAILURE; }
EXPORT Result nvrtcGetLoweredName(Program *, const char *, const char **) { return NAME_EXPRESSION_NOT_VALID; }
