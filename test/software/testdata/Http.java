import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Executors;

/**
 * java Http.java server: the JDK's HTTP server on 8080, and on 8081 one that echoes
 * records over blocking sockets. client URL: requests of every kind. records HOST:
 * records of many sizes. Both print what came back.
 */
public class Http {
    static byte[] content(int n) {
        byte[] out = new byte[n];
        int x = n;
        for (int i = 0; i < n; i++) {
            x = x * 1664525 + 1013904223;
            out[i] = (byte) (x >>> 24);
        }
        return out;
    }

    static String sha(byte[] data) throws Exception {
        return data.length + " bytes " + HexFormat.of().formatHex(MessageDigest.getInstance("SHA-256").digest(data));
    }

    static int number(HttpExchange e) {
        String q = e.getRequestURI().getQuery();
        return q == null || !q.startsWith("n=") ? 0 : Integer.parseInt(q.substring(2));
    }

    interface Reply { byte[] to(HttpExchange e) throws Exception; }

    static void handle(HttpServer server, String path, boolean chunked, Reply reply) {
        server.createContext(path, e -> {
            try (e) {
                byte[] body = reply.to(e);
                e.sendResponseHeaders(200, chunked ? 0 : body.length == 0 ? -1 : body.length);
                if (chunked || body.length > 0) {
                    try (OutputStream out = e.getResponseBody()) {
                        for (int i = 0; i < body.length; i += 5000) {
                            out.write(body, i, Math.min(5000, body.length - i));
                            if (chunked) out.flush();
                        }
                    }
                }
            } catch (IOException err) {
                throw err;
            } catch (Exception err) {
                throw new IOException(err);
            }
        });
    }

    static void serve() throws Exception {
        HttpServer server = HttpServer.create(new InetSocketAddress(8080), 0);
        server.setExecutor(Executors.newCachedThreadPool());
        handle(server, "/bytes", false, e -> content(number(e)));
        handle(server, "/chunks", true, e -> content(number(e)));
        handle(server, "/digest", false, e -> (sha(e.getRequestBody().readAllBytes()) + "\n").getBytes());
        handle(server, "/headers", false, e -> {
            e.getResponseHeaders().set("X-Large-Reply", "r".repeat(number(e)));
            return (sha(String.valueOf(e.getRequestHeaders().getFirst("X-Large-00")).getBytes()) + "\n").getBytes();
        });
        server.start();
        try (ServerSocket listener = new ServerSocket(8081)) {
            while (true) {
                Socket s = listener.accept();
                new Thread(() -> echo(s)).start();
            }
        }
    }

    static void echo(Socket s) {
        try (s) {
            DataInputStream in = new DataInputStream(s.getInputStream());
            DataOutputStream out = new DataOutputStream(s.getOutputStream());
            while (true) {
                byte[] record = new byte[in.readInt()];
                in.readFully(record);
                out.writeInt(record.length);
                out.write(record);
            }
        } catch (IOException end) {
            // the client has closed
        }
    }

    static void records(String host) throws Exception {
        try (Socket s = new Socket(host, 8081)) {
            DataInputStream in = new DataInputStream(s.getInputStream());
            DataOutputStream out = new DataOutputStream(s.getOutputStream());
            for (int i = 0; i < 300; i++) {
                byte[] record = content(i * i * 5);
                out.writeInt(record.length);
                Thread writer = new Thread(() -> {
                    try {
                        out.write(record);
                    } catch (IOException err) {
                        err.printStackTrace();
                    }
                });
                writer.start();
                byte[] back = new byte[in.readInt()];
                in.readFully(back);
                writer.join();
                System.out.println(i + " " + sha(back));
            }
        }
    }

    static String line(String path, HttpResponse<byte[]> r) throws Exception {
        return path + " " + r.statusCode() + " " + sha(r.body()) + " " + r.headers().firstValue("X-Large-Reply").map(String::length).orElse(0);
    }

    static void visit(String base) throws Exception {
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        List<HttpRequest> all = new ArrayList<>();
        for (int i = 0; i < 50; i++) all.add(HttpRequest.newBuilder(URI.create(base + "/bytes?n=" + i)).build());
        for (String path : List.of("/bytes?n=3000000", "/chunks?n=1000000", "/nothing")) all.add(HttpRequest.newBuilder(URI.create(base + path)).build());
        all.add(HttpRequest.newBuilder(URI.create(base + "/headers?n=10000")).header("X-Large-00", "a".repeat(10000)).build());
        all.add(HttpRequest.newBuilder(URI.create(base + "/digest")).POST(HttpRequest.BodyPublishers.ofByteArray(content(5000000))).build());
        for (HttpRequest r : all) System.out.println(line(r.uri().getPath(), client.send(r, HttpResponse.BodyHandlers.ofByteArray())));
        List<CompletableFuture<HttpResponse<byte[]>>> replies = new ArrayList<>();
        for (int i = 0; i < 8; i++) {
            HttpRequest r = HttpRequest.newBuilder(URI.create(base + "/digest")).POST(HttpRequest.BodyPublishers.ofByteArray(content(300000 + i))).build();
            replies.add(client.sendAsync(r, HttpResponse.BodyHandlers.ofByteArray()));
        }
        for (CompletableFuture<HttpResponse<byte[]>> r : replies) System.out.println(line("/digest", r.get()));
    }

    public static void main(String[] args) throws Exception {
        switch (args[0]) {
            case "server" -> serve();
            case "client" -> visit(args[1]);
            case "records" -> records(args[1]);
            default -> throw new IllegalArgumentException(args[0]);
        }
    }
}
