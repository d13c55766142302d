/// Events are many small pieces that one thread makes and another lets go of.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    laneway::cli::main()
}
