fn main() -> std::process::ExitCode {
    laneway::cli::main()
}
