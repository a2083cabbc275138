// node http.js server PORT: an HTTP server. node http.js client URL: requests of
// every kind to it, by both of Node's clients, and what came back.
'use strict';
const http = require('http');
const crypto = require('crypto');

const sha = (data) => data.length + ' bytes ' + crypto.createHash('sha256').update(data).digest('hex');

function content(n) {
  const out = Buffer.alloc(n);
  let x = n >>> 0;
  for (let i = 0; i < n; i++) {
    x = (Math.imul(x, 1664525) + 1013904223) >>> 0;
    out[i] = x >>> 24;
  }
  return out;
}

async function body(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return Buffer.concat(parts);
}

function serve(port) {
  http.createServer(async (req, res) => {
    const url = new URL(req.url, 'http://server');
    const n = Number(url.searchParams.get('n'));
    switch (url.pathname) {
      case '/bytes':
        res.setHeader('Content-Length', n);
        return res.end(content(n));
      case '/chunks': {
        const all = content(n);
        for (let i = 0; i < n; i += 5000) {
          if (!res.write(all.subarray(i, i + 5000))) await new Promise((done) => res.once('drain', done));
        }
        return res.end();
      }
      case '/digest':
        return res.end(sha(await body(req)) + '\n');
      case '/headers': {
        const got = Object.keys(req.headers).filter((k) => k.startsWith('x-large')).sort().map((k) => k + req.headers[k]);
        res.setHeader('X-Large-Reply', 'r'.repeat(n));
        return res.end(sha(Buffer.from(got.join('\n'))) + '\n');
      }
      case '/echo':
        return req.pipe(res);
      default:
        res.statusCode = 404;
        return res.end('nothing here\n');
    }
  }).listen(port);
}

function request(agent, base, path, options, data) {
  return new Promise((done, fail) => {
    const req = http.request(base + path, { agent, ...options }, async (res) => {
      try {
        done(`${path} ${res.statusCode} ${sha(await body(res))} reused ${req.reusedSocket}`);
      } catch (err) {
        fail(err);
      }
    });
    req.on('error', fail);
    req.end(data);
  });
}

async function visit(base) {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  for (let i = 0; i < 50; i++) console.log(await request(agent, base, '/bytes?n=' + i, {}));
  console.log(await request(agent, base, '/bytes?n=3000000', {}));
  console.log(await request(agent, base, '/chunks?n=1000000', {}));
  console.log(await request(agent, base, '/digest', { method: 'POST' }, content(5000000)));
  console.log(await request(agent, base, '/headers?n=10000', { headers: { 'x-large-1': 'a'.repeat(10000) } }));
  console.log(await request(agent, base, '/nothing', {}));
  agent.destroy();
  const replies = await Promise.all([...Array(8).keys()].map(async (i) => {
    const res = await fetch(base + '/echo', { method: 'POST', body: content(300000 + i) });
    return `echo ${i} ${res.status} ${sha(Buffer.from(await res.arrayBuffer()))}`;
  }));
  console.log(replies.join('\n'));
  process.exit(0);
}

if (process.argv[2] === 'server') serve(Number(process.argv[3]));
else visit(process.argv[3]);
