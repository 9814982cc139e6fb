//! What a package of the distribution leans on: systemd, the manual, the image's own check.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::fixture::*;

fn highwater(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_highwater")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn systemd_is_told_when_it_is_ready_that_it_lives_when_it_reloads_and_when_it_stops() {
    let directory = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let config = directory.path().join("config.yaml");
    // No node: it is ready as soon as it accepts clients.
    let text = "listen: 127.0.0.1:0\nhttp: null\nnodes: [ { name: a, host: 127.0.0.1, port: 1 } ]\n\
        control: { user: u, password: p }\n";
    std::fs::write(&config, text).unwrap();
    let mut process = Command::new(env!("CARGO_BIN_EXE_highwater"))
        .args(["run", "-c"])
        .arg(&config)
        .env("NOTIFY_SOCKET", directory.path().join("notify"))
        .env("WATCHDOG_USEC", "300000")
        .env_remove("WATCHDOG_PID")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let heard = || {
        let mut message = [0; 4096];
        let length = socket.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let first = heard();
    assert!(
        first.starts_with("READY=1\n") && first.contains("STATUS=accepting clients on 127.0.0.1:"),
        "{first}"
    );
    for _ in 0..3 {
        assert_eq!(heard().trim(), "WATCHDOG=1");
    }
    let pid = nix::unistd::Pid::from_raw(i32::try_from(process.id()).unwrap());
    let next = || std::iter::repeat_with(heard).find(|message| message.trim() != "WATCHDOG=1").unwrap();
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    let reloading = next();
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert_eq!(next(), first);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let last = next();
    assert!(last.starts_with("STOPPING=1\n") && last.contains("STATUS=SIGTERM: draining"), "{last}");
    assert!(process.wait().unwrap().success());
}

#[test]
fn the_unit_is_one_that_systemd_takes() {
    let unit =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/highwater.service"));
    let unit = unit.unwrap();
    for line in ["Type=notify", "WatchdogSec=30s", "NoNewPrivileges=yes", "ProtectSystem=strict"] {
        assert!(unit.lines().any(|l| l == line), "{line}");
    }
    if !Path::new("/usr/bin/systemd-analyze").exists() {
        eprintln!("SKIPPED: no systemd-analyze on this machine");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("highwater.service");
    // It looks whether the programs are there.
    std::fs::write(&file, unit.replace("/usr/bin/highwater", env!("CARGO_BIN_EXE_highwater"))).unwrap();
    let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&file).output().unwrap();
    let said = said(&output);
    assert!(output.status.success() && !said.contains("highwater.service"), "{said}");
    // Of 100, how exposed it leaves the machine; a service without any of this has 96.
    let mut security = Command::new("systemd-analyze");
    security.args(["security", "--offline=true", "--threshold=20"]).arg(&file);
    let output = security.output().unwrap();
    assert!(output.status.success(), "{}", self::said(&output));
}

#[tokio::test]
async fn healthcheck_says_of_a_running_proxy_whether_it_lives_and_whether_it_can_serve() {
    let cluster = Cluster::start(0).await;
    let overrides = "http_token: hidden-word";
    let proxy = Proxy::start_with(
        &cluster,
        ProxyOptions { overrides, start: Start::Ready, ..ProxyOptions::default() },
    )
    .await;
    let config = proxy.directory().join("config.yaml");
    let config = config.to_str().unwrap();
    let http = format!("127.0.0.1:{}", proxy.http_port());
    for arguments in [
        &["healthcheck", "-c", config][..],
        &["healthcheck", "--http", &http],
        &["healthcheck", "--ready", "-c", config],
    ] {
        let output = highwater(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    }
    cluster.link(0).cut();
    eventually("without a node it lives, and cannot serve", || async {
        highwater(&["healthcheck", "-c", config]).status.success()
            && highwater(&["healthcheck", "--ready", "-c", config]).status.code() == Some(1)
    })
    .await;
    let text = std::fs::read_to_string(config).unwrap();
    assert!(proxy.stop().await.success());
    let output = highwater(&["healthcheck", "--http", &http]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("refused"), "{}", said(&output));
    // Where there is nothing to ask, the arguments are wrong.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.yaml");
    std::fs::write(&file, text.replace(&format!("http: {http}"), "http: null")).unwrap();
    assert_eq!(highwater(&["healthcheck", "-c", file.to_str().unwrap()]).status.code(), Some(2));
    assert_eq!(highwater(&["healthcheck"]).status.code(), Some(2));
}

#[test]
fn the_manual_and_the_completions_know_every_command() {
    let directory = tempfile::tempdir().unwrap();
    let output = highwater(&["manual", "--to", directory.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}", said(&output));
    let read = |path: &str| std::fs::read_to_string(directory.path().join(path)).unwrap();
    let help = said(&highwater(&["--help"]));
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.contains(&"run") && commands.contains(&"healthcheck") && !commands.contains(&"manual"));
    let (page, bash, zsh, fish) = (
        read("man/highwater.1"),
        read("completions/highwater.bash"),
        read("completions/_highwater"),
        read("completions/highwater.fish"),
    );
    for section in ["EXIT STATUS", "SIGNALS", "SYNOPSIS"] {
        assert!(page.contains(section), "{section}: {page}");
    }
    for command in commands {
        let own = read(&format!("man/highwater-{command}.1"));
        assert!(own.contains("SYNOPSIS") && own.contains(&format!("highwater {command}")), "{own}");
        for whole in [&page, &bash, &zsh, &fish] {
            assert!(whole.contains(command), "{command} is missing");
        }
    }
}

#[test]
fn the_image_and_the_composition_hold_together() {
    let text =
        |path: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let dockerfile = text("docker/Dockerfile");
    for line in ["USER highwater", "STOPSIGNAL SIGTERM"] {
        assert!(dockerfile.lines().any(|l| l == line), "{line}");
    }
    assert!(dockerfile.contains("HEALTHCHECK") && dockerfile.contains("highwater\", \"healthcheck\""));
    // The configuration is not wrong (2), but its nodes are not there (1).
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker/config.yaml");
    let output = Command::new(env!("CARGO_BIN_EXE_highwater"))
        .args(["check", "-c"])
        .arg(config)
        .env("HIGHWATER_PASSWORD", "x")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    // Whatever the composition mounts or builds from is in the tree.
    let mut compose: serde_yaml::Value = serde_yaml::from_str(&text("docker/compose.yaml")).unwrap();
    compose.apply_merge().unwrap();
    let services = compose["services"].as_mapping().unwrap();
    assert_eq!(services.len(), 6);
    for (name, service) in services {
        let name = name.as_str().unwrap();
        let image = service["image"].as_str().unwrap_or_default();
        assert!(
            service.get("build").is_some() || image.contains(':') && !image.ends_with(":latest"),
            "{name}: {image}"
        );
        for mount in service["volumes"].as_sequence().into_iter().flatten() {
            let source = mount.as_str().unwrap().split(':').next().unwrap();
            if source.starts_with('.') {
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker").join(source);
                assert!(path.exists(), "{name} mounts {source}, which is not there");
            }
        }
        if let Some(build) = service.get("build") {
            let context = build["context"].as_str().unwrap();
            let context = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker").join(context);
            let file = context.join(build["dockerfile"].as_str().unwrap_or("Dockerfile"));
            assert!(file.exists(), "{name}: {}", file.display());
        }
    }
}

/// The headings of a page as its anchors.
fn anchors(page: &str) -> Vec<String> {
    let plain = |c: char| c.is_alphanumeric() || c == ' ' || c == '-' || c == '_';
    page.lines()
        .filter_map(|line| line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")))
        .map(|heading| {
            heading.to_lowercase().chars().filter(|c| plain(*c)).collect::<String>().replace(' ', "-")
        })
        .collect()
}

#[test]
fn every_link_of_the_documentation_leads_to_a_file_and_a_heading_that_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = vec![root.join("README.md")];
    for folder in ["docs", "docs/decisions"] {
        let files = std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(files.filter(|path| path.extension().is_some_and(|e| e == "md")));
    }
    let mut followed = 0;
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") || link.contains(char::is_whitespace) {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link} leads nowhere", page.display());
            if !anchor.is_empty() {
                let headings = anchors(&std::fs::read_to_string(&target).unwrap());
                assert!(headings.iter().any(|h| h == anchor), "{}: no heading {link}", page.display());
            }
            followed += 1;
        }
    }
    assert!(followed > 20, "{followed}");
}
